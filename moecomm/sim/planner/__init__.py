"""Planner: predicts times and traffic of a model on a cluster with the sim world. `python -m moecomm plan`.

question  the input: model, cluster, ranks, tokens, routing
predict   one simulated step: times, bytes per hop, busiest link, memory
sweeps    predictions with one parameter varied: SMs, node limit, precision, ranks, tokens
report    the results as text, JSON and one HTML page
"""

from __future__ import annotations

from .predict import Prediction, predict
from .question import Question, ask
from .sweeps import Plan, make_plan

__all__ = ["Plan", "Prediction", "Question", "ask", "make_plan", "predict"]
