"""Serving with real processes: tokens equal those of one process, placements change meanwhile, units are killed."""

import asyncio
import json
import os
import random
import signal
import tempfile
import time
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import moecomm
from examples.deepseek_v3.config import TINY, Yarn
from examples.deepseek_v3.model import Model
from examples.deepseek_v3.serve.config import ServeConfig, UnitShape
from examples.deepseek_v3.serve.launch import serving
from examples.deepseek_v3.serve.model import generate, load_model, mismatches, trained
from moecomm import InvalidArgument, MoecommError, PeerLost, PeerTimeout


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread: the oracle's products are small, and the ranks need the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(**changes):
    base = dict(
        model=TINY,
        prefill=UnitShape(2, 2),
        decode=UnitShape(2, 1),
        slots=4,
        max_len=48,
        prefill_tokens=40,
        rebalance_seconds=0.0,
        timeout=60.0,
    )
    return ServeConfig(**{**base, **changes})


def requests_of(seed, count):
    """Return (prompt, max_tokens) of random lengths, including the minimum and the maximum."""
    draw = random.Random(seed)
    out = [([5], 47), ([draw.randrange(64) for _ in range(47)], 1)]
    while len(out) < count:
        length = draw.randrange(1, 30)
        out.append(([draw.randrange(64) for _ in range(length)], draw.randrange(1, 19)))
    return out


async def serve_one(router, prompt, max_tokens, stop=()):
    """Return the complete request; its streamed tokens must equal its tokens."""
    request, streamed = router.submit(prompt, max_tokens, stop), []
    async for news in router.stream(request):
        streamed += news
    assert streamed == request.tokens
    return request


def leftovers():
    """Return the existing files of windows and sockets."""
    return {*Path("/dev/shm").glob("moecomm*"), *Path(tempfile.gettempdir()).glob("moecomm-serve-*")}


@asynccontextmanager
async def cleanly(said):
    """Serve, then check that no process and no file is left."""
    before = leftovers()
    async with serving(said) as router:
        processes = [*router.prefill.processes, *router.decode.processes]
        yield router
    assert all(not p.is_alive() for p in processes)
    assert not leftovers() - before


def changed(router, done):
    """Tell whether both units have changed their placements, and two placements decoded a sequence."""
    return (
        len(router.decode_log.placements) >= 2
        and len(router.prefill_log.placements) >= 1
        and any(len([unit for unit, _ in r.versions if unit == "decode"]) > 1 for r in done)
    )


@pytest.mark.parametrize(
    "speculative,policy,shapes",
    [
        (True, "shuffle", (UnitShape(2, 2), UnitShape(2, 1))),
        # Attention of two ranks in both units; two decode groups.
        (True, "shuffle", (UnitShape(2, 2, attention_tp=2), UnitShape(4, 2, attention_tp=2))),
        # In one unit only: a rank writes the KV of a prompt to two, or one of two writes it. A group over two nodes.
        (False, "load", (UnitShape(2, 2), UnitShape(2, 1, attention_tp=2))),
        (True, "load", (UnitShape(2, 1, attention_tp=2), UnitShape(2, 2))),
    ],
)
def test_tokens_are_those_of_one_process(speculative, policy, shapes):
    """All tokens of all requests are equal, while placements of both units change in the middle of sequences."""
    said = config(
        speculative=speculative, policy=policy, rebalance_seconds=0.2, prefill=shapes[0], decode=shapes[1]
    )
    seed = int.from_bytes(os.urandom(4), "little")

    async def run():
        async with cleanly(said) as router:
            done, rounds = [], 0
            while rounds < 2 or (rounds < 20 and not changed(router, done)):
                work = [serve_one(router, *r) for r in requests_of(seed + rounds, 16)]
                done += await asyncio.gather(*work)
                rounds += 1
            return done, router

    done, router = asyncio.run(run())
    model = load_model(said)
    wrong = {r.number: mismatches(model, r.prompt, r.tokens) for r in done}
    assert sum(n for n, _ in wrong.values()) == 0, (seed, wrong)
    for request in done[:4]:
        assert request.tokens == generate(model, request.prompt, request.max_tokens), seed
    assert all(len(r.tokens) == r.max_tokens for r in done), seed
    assert changed(router, done), (len(done), router.stats())
    assert router.finished == len(done)
    assert router.lost == router.refused == 0
    assert sorted(map(sorted, router.free)) == [[0, 1, 2, 3]] * said.decode.groups
    if speculative:
        assert router.decode_log.accepted > 0
    per_token = (TINY.layers + TINY.mtp) * TINY.cache_width * 8
    per_token *= said.decode.attention_tp  # each rank of a group has the whole cache
    assert sum(router.prefill_log.kv_bytes.values()) == per_token * sum(len(r.prompt) for r in done)


def test_stop_cancel_and_refusals():
    """A stop token ends a request and is its last token.

    A canceled request frees its slot, and requests that are too long are refused.
    """
    said = config()
    model = load_model(said)

    async def run():
        async with cleanly(said) as router:
            plain = await serve_one(router, [1, 2, 3], 20)
            stop = plain.tokens[7]
            stopped = await serve_one(router, [1, 2, 3], 20, [stop])
            assert stopped.tokens == plain.tokens[: plain.tokens.index(stop) + 1]
            assert stopped.tokens == generate(model, [1, 2, 3], 20, [stop])
            assert (stopped.finish_reason, plain.finish_reason) == ("stop", "length")

            leaving = [router.submit([7] * n, 30) for n in range(1, 13)]  # more than there are slots
            await asyncio.sleep(0.15)
            for request in leaving:
                router.cancel(request)
            after = await asyncio.wait_for(serve_one(router, [4, 4], 10), 100)
            assert after.tokens == generate(model, [4, 4], 10)
            assert any(len(r.tokens) < 30 for r in leaving)

            cut_off = router.submit([9], 40)
            for prompt, max_tokens in (([], 5), ([64], 5), ([-1], 5), ([1], 0), ([1] * 40, 9)):
                with pytest.raises(InvalidArgument, match="expected"):
                    router.submit(prompt, max_tokens)
        with pytest.raises(MoecommError, match="closed"):
            async for _ in router.stream(cut_off):
                pass

    asyncio.run(run())


async def under_way(router, count=8):
    """Return the requests that are being decoded."""
    work = [asyncio.ensure_future(serve_one(router, [i + 1] * 9, 39)) for i in range(count)]
    while not router.active:
        await asyncio.sleep(0.005)
    return work


@pytest.mark.parametrize(
    "unit,how,tp", [("decode", "KILL", 2), ("prefill", "KILL", 1), ("decode", "STOP", 1)]
)
def test_a_lost_unit_is_a_typed_error(unit, how, tp):
    """Requests that need the unit raise at once, or within the timeout if a rank is stopped.

    The other requests complete.
    """
    said = config(timeout=5.0 if how == "STOP" else 60.0, decode=UnitShape(2, 1, attention_tp=tp))

    async def run():
        async with cleanly(said) as router:
            work = await under_way(router)
            victim = getattr(router, unit).processes[1]
            begin = time.monotonic()
            os.kill(victim.pid, getattr(signal, f"SIG{how}"))
            if unit == "prefill":
                while router.prefill.error is None:
                    await asyncio.sleep(0.01)
            results = await asyncio.wait_for(asyncio.gather(*work, return_exceptions=True), 100)
            with pytest.raises(MoecommError):
                router.submit([1], 1)
            return results, time.monotonic() - begin, getattr(router, unit).error

    results, seconds, error = asyncio.run(run())
    assert isinstance(error, PeerTimeout if how == "STOP" else (PeerLost, PeerTimeout)), error
    assert (error.phase, unit in str(error)) == (unit, True)
    assert seconds < 50
    failed = [r for r in results if isinstance(r, Exception)]
    assert all(type(r) is type(error) for r in failed)
    if unit == "decode":
        assert len(failed) == len(results)
    else:  # sequences in the decode unit continue
        model = load_model(said)
        complete = [r for r in results if not isinstance(r, Exception)]
        assert complete
        assert all(mismatches(model, r.prompt, r.tokens)[0] == 0 for r in complete)


def test_what_training_has_left_is_served(tmp_path):
    """The folder of `make v3-train` is served: its sizes, weights and tokenizer."""
    pytest.importorskip("safetensors", reason="safetensors is not installed: make examples")
    from examples.deepseek_v3 import checkpoint

    with pytest.raises(InvalidArgument, match="make v3-train"):
        trained(tmp_path)
    sizes = replace(TINY, yarn=Yarn(original=16))
    model = Model(sizes).initialize(7)
    with moecomm.Communicator("alone") as comm:
        checkpoint.save(tmp_path / "checkpoint", comm, model, torch.optim.AdamW(model.parameters()), {})
    (tmp_path / "results.json").write_text(json.dumps({"config": asdict(sizes)}))
    config, where, tokenizer = trained(tmp_path)
    assert (config, tokenizer) == (sizes, str(tmp_path / "tokenizer.json"))
    loaded = load_model(ServeConfig(model=config, checkpoint=where))
    prompt = [1, 2, 3]
    assert generate(loaded, prompt, 9) == generate(model.double(), prompt, 9)
    assert generate(loaded, prompt, 9) != generate(load_model(ServeConfig(model=config)), prompt, 9)


def test_a_unit_that_cannot_start_says_why(tmp_path):
    """An error of a rank before it has joined reaches the caller as a typed error."""
    said = config(checkpoint=str(tmp_path / "missing.pt"))

    async def run():
        async with cleanly(said):
            pass

    with pytest.raises(MoecommError, match=r"unit, rank \d: FileNotFoundError"):
        asyncio.run(run())
