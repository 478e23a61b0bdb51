"""Planner: what a cluster would do with a model's tokens, predicted by the sim world. `python -m moecomm plan`.

question  what is asked: model, cluster, ranks, tokens, routing
predict   one simulated step: times, bytes per hop, the hottest link, memory
sweeps    the same with one thing varied: SMs, node limit, precision, ranks, tokens
report    as text, JSON, and one HTML page
"""

from __future__ import annotations

from .predict import Prediction, predict
from .question import Question, ask
from .sweeps import Plan, make_plan

__all__ = ["Plan", "Prediction", "Question", "ask", "make_plan", "predict"]
