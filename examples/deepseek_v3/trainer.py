"""Training over ranks: each rank has a part of the experts and of the batch. All other parameters are replicated.

Source: technical report, sections 2.1.2 (balance), 2.2 (MTP) and 4.2 (hyper-parameters).
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812 - torch's own spelling

import moecomm
from moecomm.errors import InvalidArgument
from moecomm.gate import balance_loss, count_picks
from moecomm.overlap import Trace

from . import checkpoint
from .config import Config
from .mixture import Batch, Mixture
from .model import Block, Model
from .moe import make_buffer
from .precision import LowMoE
from .ranks import sum_over_ranks
from .schedule import Schedule, batch_size, bias_speed, learning_rate, mtp_weight
from .stages import Flow, run

PRECISIONS = ("float32", "bf16", "fp8")


@dataclass
class Row:
    """Report of a step, over the whole batch. None: the batch had no such tokens.

    Attributes
    ----------
    loss, mtp_loss : float or None
        Loss of text in nats per token, of the model and of MTP.
    needle_loss, needles : float or None
        Loss of secrets, and the share of their words that are predicted correctly.
    accepted : float or None
        Share of the tokens of MTP that equal the model's own next token.
    balance : float
        Load of the busiest expert divided by the mean, in the worst layer.
    gradient : float
        Norm of the gradient before clipping.
    communication : float
        Share of the time in dispatch and combine, including waiting.
    seconds : float
    """

    step: int
    tokens: int
    length: int
    sequences: int
    learning_rate: float
    loss: float | None
    needle_loss: float | None
    needles: float | None
    mtp_loss: float | None
    accepted: float | None
    balance: float
    gradient: float
    communication: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Fields as a dict."""
        return asdict(self)


class Trainer:
    """A model with its optimizer and data. All calls are collective.

    Parameters
    ----------
    comm : moecomm.Communicator
    config : Config
    mixture : Mixture
    schedule : Schedule
    seed : int
        Seed of the initial weights.
    max_tokens : int
        Maximum number of tokens of a rank in one step.
    precision : "float32", "bf16" or "fp8"
        Precision of dispatch, experts and combine.
    overlap, recompute : bool
        Two overlapping micro-batches; activation checkpointing.
    secret_weight : float
        Weight of the loss of secrets. That of text is 1.

    Raises
    ------
    InvalidArgument
        precision is none of these.
    """

    def __init__(
        self,
        comm: moecomm.Communicator,
        config: Config,
        mixture: Mixture,
        schedule: Schedule,
        *,
        seed: int = 0,
        max_tokens: int,
        precision: str = "float32",
        overlap: bool = True,
        recompute: bool = False,
        secret_weight: float = 1.0,
    ) -> None:
        if precision not in PRECISIONS:
            raise InvalidArgument(
                f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}", op="Trainer"
            )
        self.comm, self.mixture, self.schedule = comm, mixture, schedule
        self.overlap, self.recompute, self.secret_weight = overlap, recompute, secret_weight
        self.tokens = self.steps = 0
        low = precision != "float32"
        self.buffer = make_buffer(
            comm,
            config,
            max_tokens,
            dtype=torch.bfloat16 if low else torch.float32,
            dispatches=2 * config.moe_layers + 4,
        )
        self.model = Model(
            config,
            self.buffer,
            (lambda c: LowMoE(c, self.buffer, precision == "fp8")) if low else None,
        ).initialize(seed)
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        vectors = [p for p in self.model.parameters() if p.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": schedule.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=schedule.peak,
            betas=schedule.betas,
        )
        blocks: list[Block] = [*self.model.layers]  # type: ignore[list-item]
        if self.model.mtp is not None:
            blocks.append(self.model.mtp.block)
        self.moes = [block.mlp for block in blocks if block.has_experts]
        expert = {id(p) for moe in self.moes for p in moe.experts.parameters()}
        self.shared = [p for p in self.model.parameters() if id(p) not in expert]
        self.own = [p for p in self.model.parameters() if id(p) in expert]

    def step(
        self, length: int, *, rate: float | None = None, sequences: int | None = None
    ) -> tuple[Row, torch.Tensor]:
        """Train on the next batch; return its Row, and the picks [layers, experts] of the whole batch.

        Parameters
        ----------
        length : int
            Tokens of a sequence.
        rate, sequences : optional
            Learning rate and number of sequences, instead of those of the schedule.
        """
        begin = time.perf_counter()
        count = batch_size(self.tokens, self.schedule) if sequences is None else sequences
        after = self.tokens + count * length
        if rate is None:
            rate = learning_rate(after, self.schedule)
        whole = self.mixture.take(count, length)
        part = whole.part(self.comm.rank, self.comm.size)
        self.optimizer.zero_grad()
        with Trace(self.buffer) as trace:
            flows = run(self.model, part.ids, overlap=self.overlap, recompute=self.recompute)
            loss, sums = self._loss(flows, part, whole)
            loss.backward()
        counts = torch.stack([self._picks(flows, layer) for layer in range(len(self.moes))]).double()
        norm = self._reduce([sums, counts])
        scale = min(1.0, self.schedule.clip / (norm + 1e-6))
        for p in self.model.parameters():
            p.grad.mul_(scale)  # type: ignore[union-attr]
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        for moe, picks in zip(self.moes, counts, strict=True):
            moe.gate.update_bias(picks, bias_speed(self.tokens, self.schedule))
        self.tokens, self.steps = after, self.steps + 1
        seconds = time.perf_counter() - begin
        communication = sum(end - start for _, _, start, end in trace.spans("roles"))
        text, needle, right, mtp, accepted, compared = sums.tolist()
        has_text, asked = bool(whole.text.any()), int(whole.answers.sum())
        row = Row(
            self.steps,
            self.tokens,
            length,
            count,
            rate,
            text if has_text else None,
            needle if asked else None,
            right / asked if asked else None,
            mtp if has_text and self.model.mtp is not None else None,
            accepted / compared if compared else None,
            float((counts.max(1).values / counts.mean(1)).max()),
            norm,
            communication / seconds,
            seconds,
        )
        return row, counts

    def _loss(self, flows: list[Flow], part: Batch, whole: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's share of the loss, and of the sums for a Row. The shares of all ranks add up."""
        total = torch.zeros(())
        sums = torch.zeros(6, dtype=torch.float64)
        weights = [_weights(whole, 1), _weights(whole, 2)]
        lam, first = mtp_weight(self.tokens, self.schedule), 0
        for flow in flows:
            size = len(flow.ids)
            texts, answers = (t[first : first + size] for t in part[1:])
            first += size
            for ahead, logits in (
                (1, flow.logits[:, :-1]),
                (2, None if flow.drafts is None else flow.drafts[:, :-1]),
            ):
                if logits is None:
                    continue
                losses = F.cross_entropy(
                    logits.flatten(0, 1).float(), flow.ids[:, ahead:].flatten(), reduction="none"
                ).view(size, flow.ids.shape[1] - ahead)
                text = (losses * texts[:, ahead:]).sum() * weights[ahead - 1][0]
                needle = (losses * answers[:, ahead:]).sum() * weights[ahead - 1][1]
                total = total + (text + self.secret_weight * needle) * (1.0 if ahead == 1 else lam)
                sums[0 if ahead == 1 else 3] += text.detach().double()
                if ahead == 1:
                    sums[1] += needle.detach().double()
                    right = logits.argmax(-1) == flow.ids[:, 1:]
                    sums[2] += (right & answers[:, 1:]).sum()
            if flow.drafts is not None:
                agreed = flow.drafts.argmax(-1) == flow.logits[:, 1:].argmax(-1)
                sums[4] += (agreed & texts[:, 1:]).sum()
                sums[5] += texts[:, 1:].sum()
            for routing in flow.routings:
                # MTP's block has one token less in each sequence.
                per = len(routing.topk_ids) // max(size, 1)
                affinities, ids = (
                    t.view(size, per, t.shape[1]) for t in (routing.affinities, routing.topk_ids)
                )
                balance = balance_loss(affinities, ids, self.schedule.alpha)
                total = total + balance * (size / len(whole.ids))
        return total, sums

    def _picks(self, flows: list[Flow], layer: int) -> torch.Tensor:
        experts = self.model.config.num_experts
        return sum((count_picks(f.routings[layer].topk_ids, experts) for f in flows), torch.zeros(experts))

    def _reduce(self, tensors: list[torch.Tensor]) -> float:
        """Sum the gradients of replicated parameters, and these tensors, over ranks; return the gradient's norm."""
        for p in self.model.parameters():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        own = torch.stack([p.grad.double().square().sum() for p in self.own]).sum()[None]  # type: ignore[union-attr]
        grads: list[torch.Tensor] = [p.grad for p in self.shared]  # type: ignore[misc]
        sum_over_ranks(self.comm, [*grads, own, *tensors])
        return float(sum(g.double().square().sum() for g in grads) + own[0]) ** 0.5

    def save(self, folder: str | Path) -> None:
        """Write a checkpoint, with which any number of ranks can continue."""
        progress = {"tokens": self.tokens, "steps": self.steps, "data": self.mixture.state()}
        checkpoint.save(folder, self.comm, self.model, self.optimizer, progress)

    def load(self, folder: str | Path) -> None:
        """Continue from a checkpoint of any number of ranks."""
        progress = checkpoint.load(folder, self.model, self.optimizer)
        self.tokens, self.steps = progress["tokens"], progress["steps"]
        self.mixture.resume(progress["data"])


def _weights(batch: Batch, ahead: int) -> tuple[float, float]:
    """Factors that turn sums of the losses of text and of secrets into means over the whole batch."""
    return (
        1.0 / max(int(batch.text[:, ahead:].sum()), 1),
        1.0 / max(int(batch.answers[:, ahead:].sum()), 1),
    )
