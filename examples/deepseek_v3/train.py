"""Trains a small DeepSeek-V3 on text of this machine, then extends its context in two phases.

    mpirun -n 2 python -m examples.deepseek_v3.train --out build/v3-train        # make v3-train
    torchrun --nproc-per-node 2 -m examples.deepseek_v3.train

Writes results.json, training.png, schedule.png, needles.png, tokenizer.json and a checkpoint, with which any number
of ranks can continue (--resume). Needs the extra `examples`. Source: technical report, sections 4.1 to 4.3.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

import moecomm

from . import needle, report, schedule
from .config import MINI, Yarn
from .corpus import documents, fingerprint
from .mixture import Mixture
from .needle import Grid
from .ranks import agree
from .tokenizer import Tokenizer
from .trainer import PRECISIONS, Row, Trainer

DEPTHS = [0.0, 0.25, 0.5, 0.75, 1.0]


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("build/v3-train"), help="folder for all results")
    add("--steps", type=int, default=800, help="approximate number of pre-training steps in the schedule")
    add(
        "--stop", type=int, default=0, help="stop pre-training after this step; 0: at the end of the schedule"
    )
    add("--length", type=int, default=128, help="tokens of a sequence in pre-training")
    add("--batch", type=int, default=24, help="sequences of a step, after a ramp from half of them")
    add("--rate", type=float, default=3e-3, help="peak learning rate")
    add("--gamma", type=float, default=0.01, help="step of the gates' biases")
    add(
        "--extend",
        type=int,
        nargs="*",
        default=[1024, 4096],
        help="tokens of a sequence in each phase of the extension",
    )
    add("--extend-steps", type=int, default=20, help="steps of each phase of the extension")
    add("--extend-tokens", type=int, default=8192, help="tokens of a step in the extension")
    add("--extend-rate", type=float, default=5e-4, help="learning rate of the extension")
    add("--retrieval", type=float, default=0.667, help="share of retrieval sequences")
    add("--secret-weight", type=float, default=8.0, help="weight of the loss of secrets; that of text is 1")
    add("--trials", type=int, default=4, help="secrets in each cell of the needle grid")
    add("--corpus-bytes", type=int, default=1_000_000, help="approximate size of the training text")
    add("--vocabulary", type=int, default=1024, help="number of tokens of the tokenizer")
    add("--precision", choices=PRECISIONS, default="float32", help="of dispatch, experts and combine")
    add("--compare", choices=PRECISIONS, help="pre-train again in this precision, and draw both losses")
    add("--no-overlap", action="store_true", help="one micro-batch instead of two that overlap")
    add("--recompute", action="store_true", help="activation checkpointing")
    add("--resume", type=Path, help="checkpoint to continue from, of any number of ranks")
    add("--seed", type=int, default=0)
    add("--hidden", type=int, default=MINI.hidden)
    add("--experts", type=int, default=MINI.num_experts)
    add("--quiet", action="store_true")
    return parser.parse_args(words)


def scaled_schedule(args: argparse.Namespace) -> schedule.Schedule:
    """Scale the published schedule to this run's tokens. The warmup is 5%, because it would be less than one step."""
    tokens = args.steps * args.batch * args.length
    return schedule.Schedule().scaled(
        tokens,
        peak=args.rate,
        low=args.rate / 10,
        lowest=args.rate / 30,
        warmup=0.05 * tokens,
        first_batch=args.batch // 2,
        batch=args.batch,
        gamma=args.gamma,
    )


def make_tokenizer(comm: moecomm.Communicator, texts: list[str], args: argparse.Namespace) -> Tokenizer:
    """Train the tokenizer on rank 0 and load it on all ranks."""
    path = args.out / "tokenizer.json"
    if comm.rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        Tokenizer.train(texts, args.vocabulary).save(path)
    comm.barrier()
    return Tokenizer.load(path)


def train(comm: moecomm.Communicator, args: argparse.Namespace) -> tuple[list[Row], dict[str, Grid]]:
    """Train and extend the context; return the rows of all steps and the needle grids, on every rank."""
    texts = documents(args.corpus_bytes)
    agree(comm, "texts", fingerprint(texts))
    held_out, texts = texts[::20], [t for i, t in enumerate(texts) if i % 20]
    tokenizer = make_tokenizer(comm, texts, args)
    config = replace(MINI, vocab_size=tokenizer.vocab_size, hidden=args.hidden, num_experts=args.experts)
    course = scaled_schedule(args)

    def make(precision: str) -> Trainer:
        trainer = Trainer(
            comm,
            config,
            Mixture(texts, tokenizer, args.seed, args.retrieval),
            course,
            seed=args.seed,
            max_tokens=max(args.extend_tokens, *args.extend, args.batch * args.length),
            precision=precision,
            overlap=not args.no_overlap,
            recompute=args.recompute,
            secret_weight=args.secret_weight,
        )
        if args.resume:
            trainer.load(args.resume)
        return trainer

    trainer = make(args.precision)
    rows: list[Row] = []
    loads: list[torch.Tensor] = []

    def go(length: int, **how: float) -> None:
        row, counts = trainer.step(length, **how)  # type: ignore[arg-type]
        rows.append(row)
        loads.append(counts)
        if comm.rank == 0 and not args.quiet:
            shown = [
                f"{'-' if value is None else format(value, form):>8}"
                for value, form in (
                    (row.loss, ".4f"),
                    (row.mtp_loss, ".4f"),
                    (row.accepted, ".0%"),
                    (row.needles, ".0%"),
                    (row.balance, ".2f"),
                    (row.communication, ".0%"),
                    (row.seconds, ".2f"),
                )
            ]
            print(f"{row.step:>5} {row.length:>6} {' '.join(shown)}", flush=True)

    if comm.rank == 0 and not args.quiet:
        print(f"{comm.size} ranks, {sum(p.numel() for p in trainer.model.parameters()):,} parameters on each")
        print(" step length     loss MTP loss accepted  secrets  balance communic  seconds")
    while trainer.tokens < course.total and (not args.stop or trainer.steps < args.stop):
        go(args.length)
    trainer.save(args.out / "checkpoint")
    grids: dict[str, Grid] = {}
    if args.extend:
        grids = extend(comm, trainer, tokenizer, held_out, args, go)
        trainer.save(args.out / "checkpoint-long")
    others: dict[str, list[Row]] = {}
    if args.compare:
        other = make(args.compare)
        steps = sum(row.length == args.length for row in rows)
        others[args.compare] = [other.step(args.length)[0] for _ in range(steps)]
    if comm.rank == 0:
        stacked = torch.stack(loads) if loads else torch.zeros(1, len(trainer.moes), args.experts)
        report.write_results(
            args.out / "results.json",
            comm.size,
            trainer.model.config,
            rows,
            grids,
            precision=args.precision,
            compared={name: [row.to_json() for row in other] for name, other in others.items()},
        )
        report.plot(args.out / "training.png", rows, stacked, others)
        schedule.plot(course, args.out / "schedule.png")
        if grids:
            needle.plot(grids, args.out / "needles.png")
    comm.barrier()
    return rows, grids


def extend(comm, trainer, tokenizer, held_out, args, go):  # type: ignore[no-untyped-def]
    """Extend the context: YaRN, and phases of longer sequences.

    Returns {"before": Grid, "after": Grid}, measured on text that is not used for training.
    """
    needles = trainer.mixture.needles or needle.Needles.of(tokenizer)
    text = torch.tensor([i for t in held_out for i in tokenizer.encode(t)])
    lengths = sorted({args.length, *args.extend, *(2 * n for n in [args.length, *args.extend[:-1]])})
    grids = {}

    def ask(name: str) -> None:
        grids[name] = needle.measure(trainer.model, needles, text, lengths, DEPTHS, args.trials, comm)
        if comm.rank == 0 and not args.quiet:
            print(
                f"needles {name}: " + ", ".join(f"{n}: {grids[name].at(n):.0%}" for n in lengths), flush=True
            )

    ask("before")
    trainer.model.set_yarn(Yarn(original=args.length))
    for length in args.extend:
        for _ in range(args.extend_steps):
            go(length, rate=args.extend_rate, sequences=max(comm.size, args.extend_tokens // length))
    ask("after")
    return grids


def main() -> None:
    """Train, and print the names of the result files."""
    args = arguments()
    torch.set_num_threads(1)
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    with moecomm.Communicator() as comm:
        train(comm, args)
        if comm.rank == 0 and not args.quiet:
            print(f"written: {args.out}/results.json, training.png, schedule.png, needles.png, checkpoint")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
