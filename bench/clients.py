"""Megatron-Core's MoELayer over moecomm, through the drop-in for deep_ep, against Megatron's dispatchers over gloo.

    flex       Megatron's dispatcher for deep_ep, with the backend `deepep`, over moecomm
    alltoall   Megatron's all-to-all of permuted rows
    allgather  Megatron's all-gather of all tokens

All three have the same parameters and inputs and alternate. Their results and all gradients must agree. A time is
that of a forward or a backward pass, from the start of the first rank to the end of the last. The experts are small,
so most of the time is communication. Runs in the environment of `make clients`.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from moecomm import options
from moecomm.integrations import deep_ep

from . import launch
from .world import World, join_gloo

PYTHON = Path(__file__).resolve().parent.parent / ".venv-clients" / "bin" / "python"
OWN = "flex"
DISPATCHERS = ("alltoall", "allgather", OWN)
PASSES = ("forward", "backward")
TOLERANCE = 1e-5  # relative to 1 + |value|, in float32


def arguments(parser):
    """Add the options of the command."""
    add = parser.add_argument
    add("--ranks", type=options.positives, default="2,4", help="numbers of ranks")
    add("--tokens", type=options.positive, default=256, help="tokens per rank")
    add("--hidden", type=options.positive, default=1024, help="elements of a token")
    add("--experts", type=options.positive, default=32, help="experts over all ranks")
    add("--top-k", type=options.positive, default=4, help="picks per token")
    add("--ffn", type=options.positive, default=64, help="hidden size of an expert")
    add("--iters", type=options.positive, default=10, help="timed iterations")
    add("--json", type=options.file_to_write, metavar="FILE", help="append one JSON object per world")


def why_not():
    """Reason why the clients cannot run, or None."""
    if find_spec("megatron") or PYTHON.exists():
        return None
    return "megatron-core is not installed; `make clients` installs it in a separate environment"


def main(args):
    """Print one row per world, dispatcher and pass. The exit status is 1 if results differ or a rank fails."""
    reason = why_not()
    if reason:
        print(f"# skipped: {reason}")
        return 0
    if not find_spec("megatron"):
        words = [str(PYTHON), "-W", "ignore", "-m", str(__package__), *sys.argv[1:]]
        return subprocess.call(words, env=launch.environment(OMP_NUM_THREADS="1"))
    torch.set_num_threads(1)
    deep_ep.install()
    _without_a_gpu()
    status = 0
    for ranks in map(int, args.ranks.split(",")):
        status |= _fork(ranks, args)
    return status


def _without_a_gpu():
    """Replace the CUDA functions that Megatron uses: its all-to-all copies counts on a separate stream."""

    class Stream:
        """A stream whose work is always complete."""

        def wait_stream(self, other):
            """Do nothing."""

        def synchronize(self):
            """Do nothing."""

        def record_event(self, event=None):
            """Return a complete event."""
            return self

    torch.cuda.Stream = Stream
    torch.cuda.current_stream = lambda *_: Stream()
    torch.cuda.stream = lambda _: contextlib.nullcontext()
    torch.cuda.current_device = lambda: "cpu"
    exchange = dist.all_to_all_single

    def all_to_all_single(output, rows, output_split_sizes=None, input_split_sizes=None, **how):
        splits = (s.tolist() if torch.is_tensor(s) else s for s in (output_split_sizes, input_split_sizes))
        return exchange(output, rows, *splits, **how)

    torch.distributed.all_to_all_single = all_to_all_single
    import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401 - imported once, before ranks are forked
    from megatron.core.transformer.moe import moe_utils

    # Megatron 0.16.1 defines this name only with TransformerEngine.
    moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)


def _fork(ranks, args):
    """Run a world of forked ranks; return 1 if a rank fails."""
    with tempfile.TemporaryDirectory() as folder:
        pids = []
        for rank in range(ranks):
            pids.append(os.fork())
            if pids[-1] == 0:
                status = 1
                try:
                    join_gloo(init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
                    status = _measure(World.from_torch(), args)
                except BaseException:
                    sys.excepthook(*sys.exc_info())
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        failed = [os.waitpid(pid, 0)[1] for pid in pids]
        return int(any(failed))


def _layer(name, args, size, rank):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=args.hidden,
        num_attention_heads=4,
        num_moe_experts=args.experts,
        moe_router_topk=args.top_k,
        ffn_hidden_size=args.ffn,
        moe_token_dispatcher_type=name,
        expert_model_parallel_size=size,
        use_cpu_initialization=True,
        add_bias_linear=False,
        moe_grouped_gemm=False,
        **(dict(moe_flex_dispatcher_backend="deepep") if name == OWN else {}),
    )
    spec = get_gpt_layer_local_spec(num_experts=args.experts, moe_grouped_gemm=False).submodules.mlp
    layer = MoELayer(config, spec.submodules)
    with torch.no_grad():
        for key, parameter in sorted(layer.named_parameters()):
            seed = 11 + sum(key.encode()) + (1000 * rank if "experts" in key else 0)
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return layer


def _measure(world, args):
    """Measure all dispatchers alternately, as one rank; return 1 if their results differ."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(expert_model_parallel_size=world.size)
    layers = {name: _layer(name, args, world.size, world.rank) for name in DISPATCHERS}
    times = {name: {p: [] for p in PASSES} for name in DISPATCHERS}
    worst = dict.fromkeys(DISPATCHERS, 0.0)
    for i in range(args.iters + 2):
        generator = torch.Generator().manual_seed(1000 * i + world.rank)
        x = torch.randn((args.tokens, 1, args.hidden), generator=generator)
        to = torch.randn(x.shape, generator=generator)
        found = {}
        for turn in range(len(DISPATCHERS)):
            name = DISPATCHERS[(i + turn) % len(DISPATCHERS)]
            layer, own = layers[name], x.clone().requires_grad_()
            layer.zero_grad()
            y, forward = world.timed(lambda layer=layer, own=own: layer(own)[0])
            _, backward = world.timed(y.backward, to)
            gradients = [p.grad for _, p in sorted(layer.named_parameters())]
            found[name] = [y.detach(), own.grad, *gradients]
            if i >= 2:
                times[name]["forward"].append(forward)
                times[name]["backward"].append(backward)
        for name in DISPATCHERS:
            differences = (
                float(((got - want).abs() / (1 + want.abs())).max())
                for got, want in zip(found[name], found["allgather"], strict=True)
            )
            worst[name] = max(worst[name], *differences)
    worst = {name: max(each[name] for each in world.allgather(worst)) for name in DISPATCHERS}
    if world.rank == 0:
        _print(world.size, args, times, worst)
    return int(max(worst.values()) > TOLERANCE)


def _print(size, args, times, worst):
    median = {n: {p: 1e3 * float(np.median(times[n][p])) for p in PASSES} for n in DISPATCHERS}
    print(
        f"# Megatron-Core's MoELayer, {size} ranks, {args.tokens} tokens per rank, hidden {args.hidden}, "
        f"{args.experts} experts, top-{args.top_k}, {args.iters} interleaved iterations"
    )
    print(f"# {'dispatcher':<12}{'forward ms':>12}{'backward ms':>12}{'x of moecomm':>14}{'difference':>12}")
    for name in DISPATCHERS:
        whole, own = sum(median[name].values()), sum(median[OWN].values())
        shown = f"{name}" + (" (moecomm)" if name == OWN else "")
        print(
            f"  {shown:<16}{median[name]['forward']:>8.2f}{median[name]['backward']:>12.2f}"
            f"{whole / own:>14.2f}{worst[name]:>12.1e}",
            flush=True,
        )
    if args.json:
        with open(args.json, "a") as file:
            row = {"ranks": size, "tokens": args.tokens, "hidden": args.hidden, "experts": args.experts}
            print(json.dumps({**row, "top_k": args.top_k, "ms": median, "difference": worst}), file=file)
