"""The plan: predictions for a question, and sweeps that vary one parameter at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dataclasses import dataclass, field

from ...errors import InvalidArgument
from .predict import Prediction, predict
from .question import Question, ask

SMS = (2, 4, 8, 12, 16, 20, 32, 64, 132)
RANKS = (8, 16, 32, 64, 128, 256, 320)
DECODE_TOKENS = (1, 8, 16, 32, 64, 128, 256)
BATCH_TOKENS = (512, 1024, 2048, 4096)
ENOUGH = 1.05  # a number of SMs is enough if its step takes at most this factor of the fastest


@dataclass
class Plan:
    """Result of the planner.

    Attributes
    ----------
    question : Question
    prediction : Prediction
        Of the question itself.
    layers : int
        MoE layers of the model. All are assumed to communicate like this one.
    slo_ms, attention_us : float, optional
        As for make_plan.
    sweeps : dict
        {name: [(value, Prediction)]}; names: sms, node_limit, precision, ranks, tokens.
    """

    question: Question
    prediction: Prediction
    layers: int
    slo_ms: float | None = None
    attention_us: float | None = None
    sweeps: dict[str, Any] = field(default_factory=dict)

    @property
    def enough_sms(self) -> Any:
        """Smallest number of SMs whose step is at most 5% slower than the fastest."""
        swept = self.sweeps["sms"]
        best = min(p.communication_us for _, p in swept)
        return next(n for n, p in swept if p.communication_us <= ENOUGH * best)

    def step_ms(self, prediction: Any) -> Any:
        """Communication of all layers for two micro-batches, in ms per step. Nothing is hidden by computation."""
        return 2 * self.layers * prediction.communication_us / 1e3

    def tokens_per_second(self, prediction: Any, tokens: Any) -> Any:
        """Upper bounds from communication alone, for two micro-batches: (tokens/s per request, tokens/s per rank)."""
        per_step = self.step_ms(prediction) / 1e3
        return 1 / per_step, 2 * tokens / per_step

    def hidden_share(self, attention_us: float) -> Any:
        """Share of the communication of one micro-batch that attention_us of the other one's computation hides."""
        return min(1.0, attention_us / self.prediction.communication_us)

    def within_slo(self) -> Any:
        """Largest number of tokens per rank and micro-batch whose step takes at most slo_ms, or None."""
        fits = [n for n, p in self.sweeps["tokens"] if self.step_ms(p) <= self.slo_ms]
        return max(fits, default=None)


def make_plan(
    question: Any,
    *,
    layers: int = 61,
    slo_ms: float | None = None,
    attention_us: float | None = None,
    sweeps: Any = ("sms", "node_limit", "precision", "ranks", "tokens"),
    progress: Any = lambda done, of, what: None,
) -> Any:
    """Predict the question and its sweeps.

    Parameters
    ----------
    question : Question
    layers : int
        MoE layers of the model.
    slo_ms : float, optional
        Limit of the time of a step, in ms.
    attention_us : float, optional
        Computation of one micro-batch, in us, that can hide communication of the other.
    sweeps : iterable of str
        Names of the sweeps to compute.
    progress : callable(done, of, what)
        Called before each prediction and at the end.

    Raises
    ------
    InvalidArgument
        As predict.
    """
    todo = [("", None, question)] + [
        (name, value, q) for name in sweeps for value, q in _VARIED[name](question)
    ]
    answers: dict[Any, Any] = {}
    nothing: Any = None  # until the question itself is answered
    plan = Plan(question, nothing, layers, slo_ms, attention_us)
    for i, (name, value, q) in enumerate(todo):
        progress(i, len(todo), f"{name} {value}" if name else "question")
        if q not in answers:
            answers[q] = predict(q)
        if name:
            plan.sweeps.setdefault(name, []).append((value, answers[q]))
        else:
            plan.prediction = answers[q]
    progress(len(todo), len(todo), "")
    return plan


def _over_ranks(q: Any) -> Any:
    found = []
    for ranks in sorted({*RANKS, q.ranks}):
        try:
            found.append(
                (
                    ranks,
                    q
                    if ranks == q.ranks
                    else ask(
                        q.model_name,
                        q.cluster.name,
                        ranks,
                        q.tokens,
                        routing=q.routing,
                        decode=q.decode,
                        quant=q.quant,
                        num_sms=q.num_sms,
                    ),
                )
            )
        except InvalidArgument:  # the experts do not fit this number of ranks
            continue
    return found


_VARIED: dict[str, Callable[[Any], Any]] = {
    "sms": lambda q: [(n, q.varied(num_sms=n)) for n in SMS],
    "node_limit": lambda q: [
        (m, q.varied(top_groups=m))
        for m in range(1, q.groups + 1)
        if m * (q.model.num_experts // q.groups) >= q.model.top_k
    ],
    "precision": lambda q: [
        (name, q.varied(quant=quant)) for name, quant in (("bf16", None), ("fp8", "fp8"))
    ],
    "ranks": _over_ranks,
    "tokens": lambda q: [
        (n, q.varied(tokens=n)) for n in sorted({*(DECODE_TOKENS if q.decode else BATCH_TOKENS), q.tokens})
    ],
}
