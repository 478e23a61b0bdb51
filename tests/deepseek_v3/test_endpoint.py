"""The HTTP endpoint as used by OpenAI clients, on units without a model; streamed text; the load generator."""

import asyncio
import io
import json
import random
import re
import shutil
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from echo_units import answer_to, echo_router

from examples.deepseek_v3.config import TINY
from examples.deepseek_v3.serve.config import ServeConfig, UnitShape
from examples.deepseek_v3.serve.text import Bytes, TextStream, chat_prompt
from moecomm import PeerLost

aiohttp = pytest.importorskip("aiohttp", reason="aiohttp is not installed: make examples")

from examples.deepseek_v3.serve import load  # noqa: E402
from examples.deepseek_v3.serve.endpoint import Endpoint  # noqa: E402
from examples.deepseek_v3.serve.view import lines, show  # noqa: E402

CONFIG = ServeConfig(
    model=replace(TINY, vocab_size=256),
    prefill=UnitShape(2, 2),
    decode=UnitShape(2, 1),
    slots=3,
    max_len=64,
    speculative=False,
)


@asynccontextmanager
async def endpoint(pause=0.001):
    """Yield (router, session, URL) of a running server."""
    router = echo_router(CONFIG, pause)
    router.start()
    async with Endpoint(router, Bytes()).listening() as port, aiohttp.ClientSession() as session:
        yield router, session, f"http://127.0.0.1:{port}"
    await router.close()


def text_of(prompt, count):
    return bytes(answer_to(prompt.encode(), count)).decode()


async def events(response):
    """Return the events of a stream; the last one must be [DONE]."""
    lines = [line[6:].decode().strip() async for line in response.content if line.startswith(b"data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_completions_and_chat():
    """Whole and streamed answers have the same text, with usage and finish reasons."""

    async def run():
        async with endpoint() as (_, session, url):

            async def post(path, **body):
                answer = await session.post(f"{url}/v1/{path}", json=body)
                assert answer.status == 200, await answer.text()
                return await (events(answer) if body.get("stream") else answer.json())

            models = await (await session.get(f"{url}/v1/models")).json()
            assert [m["id"] for m in models["data"]] == ["deepseek-v3-mini"]
            assert (await session.get(f"{url}/v1/models/deepseek-v3-mini")).status == 200

            whole = await post("completions", prompt="hello", max_tokens=9, temperature=0)
            want = text_of("hello", 9)
            assert (whole["object"], whole["choices"][0]["text"]) == ("text_completion", want)
            assert whole["choices"][0]["finish_reason"] == "length"
            assert whole["usage"] == {"prompt_tokens": 5, "completion_tokens": 9, "total_tokens": 14}
            pieces = await post(
                "completions",
                prompt="hello",
                max_tokens=9,
                stream=True,
                return_token_ids=True,
                stream_options={"include_usage": True},
            )
            assert "".join(c["text"] for e in pieces for c in e["choices"]) == want
            ids = [i for e in pieces for c in e["choices"] for i in c["token_ids"]]
            assert ids == answer_to(b"hello", 9)
            assert pieces[-1]["usage"]["completion_tokens"] == 9
            reasons = [c["finish_reason"] for e in pieces for c in e["choices"]]
            assert reasons[-1] == "length" and set(reasons[:-1]) == {None}

            several = await post("completions", prompt=["a", "bc", [100, 101]], max_tokens=5)
            assert [c["text"] for c in several["choices"]] == [text_of(p, 5) for p in ("a", "bc", "de")]

            talk = [
                {"role": "system", "content": "s"},
                {"role": "user", "content": [{"type": "text", "text": "u"}]},
            ]
            want = text_of(chat_prompt(talk), 7)
            whole = await post("chat/completions", messages=talk, max_completion_tokens=7)
            assert whole["choices"][0]["message"] == {"role": "assistant", "content": want}
            pieces = await post("chat/completions", messages=talk, max_tokens=7, stream=True)
            deltas = [c["delta"] for e in pieces for c in e["choices"]]
            assert deltas[0] == {"role": "assistant", "content": ""}
            assert "".join(d["content"] for d in deltas) == want
            assert {e["object"] for e in pieces} == {"chat.completion.chunk"}

            long = text_of("q", 30)
            cut = await post("completions", prompt="q", max_tokens=30, stop=[long[9:12], "#"])
            assert cut["choices"][0]["text"] == long[: long.index(long[9:12])]
            assert cut["choices"][0]["finish_reason"] == "stop"

    asyncio.run(run())


@pytest.mark.parametrize(
    "body,param",
    [
        (dict(prompt="a", temperature=0.7), "temperature"),
        (dict(prompt="a", n=2), "n"),
        (dict(prompt="a", logprobs=3), "logprobs"),
        (dict(prompt="a", max_tokens=0), "max_tokens"),
        (dict(prompt="a" * 60, max_tokens=9), "max_tokens"),
        (dict(prompt=""), "prompt"),
        (dict(), "prompt"),
        (dict(prompt=[1, 256]), "prompt"),
        (dict(prompt=["a", ""]), "prompt"),
        (dict(prompt="a", stop=[1]), "stop"),
        (dict(prompt="a", model="gpt-4"), "model"),
        ([], None),
    ],
)
def test_bad_requests_are_named(body, param):
    """The status is 400, errors have OpenAI's format, and no request is left running."""

    async def run():
        async with endpoint() as (router, session, url):
            answer = await session.post(f"{url}/v1/completions", json=body)
            error = (await answer.json())["error"]
            assert (answer.status, error["type"], error["param"]) == (400, "invalid_request_error", param)
            assert "expected" in error["message"]
            assert not router.waiting
            assert (await session.get(f"{url}/v1/models/none")).status == 404

    asyncio.run(run())


def test_a_failed_unit_is_an_error_for_every_client():
    """The status is 503 with the type of the error, before and during a stream."""

    async def run():
        async with endpoint(pause=0.01) as (router, session, url):
            body = dict(prompt="a", max_tokens=60, stream=True)
            streamed = await session.post(f"{url}/v1/completions", json=body)
            waiting = asyncio.ensure_future(
                session.post(f"{url}/v1/completions", json=dict(prompt="b", max_tokens=60))
            )
            while not router.active:
                await asyncio.sleep(0.01)
            router.decode.fail(PeerLost("decode unit: the process of rank 1 has ended", op="serve", peer=1))
            said = [line async for line in streamed.content if line.startswith(b"data: ")]
            assert json.loads(said[-1][6:])["error"]["type"] == "PeerLost"
            for answer in (
                await waiting,
                await session.post(f"{url}/v1/completions", json=body),
                await session.get(f"{url}/health"),
            ):
                assert answer.status == 503
                assert (await answer.json())["error"]["type"] == "PeerLost"
            stats = await (await session.get(f"{url}/stats")).json()
            assert stats["units"]["decode"]["error"]["peer"] == 1
            assert any("FAILED: PeerLost" in line for line in lines(stats))

    asyncio.run(run())


def test_a_client_that_leaves_frees_its_slot():
    async def run():
        async with endpoint(pause=0.01) as (router, session, url):
            leaving = [
                await session.post(f"{url}/v1/completions", json=dict(prompt="a", max_tokens=63, stream=True))
                for _ in range(9)
            ]
            while len(router.active) < 6:
                await asyncio.sleep(0.01)
            for answer in leaving:
                answer.close()
            for _ in range(200):
                if not router.active and not router.waiting:
                    break
                await asyncio.sleep(0.01)
            assert [len(free) for free in router.free] == [3, 3]
            again = await session.post(f"{url}/v1/completions", json=dict(prompt="a", max_tokens=3))
            assert (await again.json())["choices"][0]["text"] == text_of("a", 3)

    asyncio.run(run())


def test_load_loses_nothing():
    """More clients than slots: every answer is complete, no slot is shared, and the page has the right numbers."""

    async def run():
        async with endpoint() as (router, session, url):
            work = load.prompts(["some text " * 20, "other " * 30], Bytes(), 40, 30, 20, seed=3)
            samples = await load.run(url, work, rate=500.0)
            for sample in samples:
                assert sample.tokens == answer_to(sample.prompt, sample.max_tokens), sample.error
            found = load.summary(samples)
            assert (found["requests"], found["failed"], found["lost_tokens"]) == (40, 0, 0)
            assert found["tokens"] == sum(most for _, most in work) == router.times.tokens
            assert 0 < found["ttft"]["p50"] <= found["ttft"]["p99"]
            assert router.decode.most == CONFIG.slots
            stats = await (await session.get(f"{url}/stats")).json()
            assert stats["requests"]["finished"] == 40
            assert len(stats["units"]["decode"]["rows_per_rank"]) == 2
            assert sum("rank" in line for line in lines(stats)) == 4
            page = await (await session.get(url)).text()
            assert "recent_rows_per_rank" in page

    asyncio.run(run())


@pytest.mark.parametrize("live", [True, False])
def test_view_in_a_terminal(monkeypatch, live):
    """A live view overwrites itself; without a terminal it prints whole lines at intervals."""
    out = io.StringIO()
    out.isatty = lambda: live
    monkeypatch.setattr("sys.stdout", out)

    async def run():
        async with endpoint() as (router, _, url):
            drawing = asyncio.ensure_future(show(router, every=0.02, line_every=0.1))
            await load.run(url, load.prompts(["some text " * 20], Bytes(), 12, 30, 20, seed=3), rate=100.0)
            await asyncio.sleep(0.3)
            drawing.cancel()
            return len(lines(router.stats()))

    height, said = asyncio.run(run()), out.getvalue()
    assert f"\x1b[{height}F" in said if live else "\x1b" not in said
    assert re.search(r"finished +12", said)
    assert said.endswith("\n")


def test_load_reports_what_is_lost():
    """The server reports more tokens than it sends."""
    sample = load.Sample([1], 5)
    load._take(sample, {"choices": [{"token_ids": [7, 8]}]})
    load._take(sample, {"choices": [], "usage": {"completion_tokens": 5}})
    assert sample.lost == 3
    assert load.summary([sample])["lost_tokens"] == 3
    load._take(sample, {"choices": [{"finish_reason": "stop"}], "usage": {"completion_tokens": 2}})
    assert sample.lost == 0


def test_text_in_pieces_is_the_whole_text():
    """For any pieces: characters of several bytes come whole, and text after a stop string is not sent."""
    draw = random.Random()
    for _ in range(200):
        text = "".join(draw.choice("abé漢🙂") for _ in range(draw.randrange(1, 30)))
        stop = draw.sample(["ab", "é漢a", "🙂", "bbb"], draw.randrange(3))
        ids, stream, out = list(text.encode()), TextStream(Bytes(), stop), ""
        while ids and not stream.stopped:
            n = draw.randrange(1, 6)
            piece, ids = ids[:n], ids[n:]
            out += stream.feed(piece, last=not ids)
        ends = [text.index(s) for s in stop if s in text]
        assert out == (text[: min(ends)] if ends else text), (text, stop)
        assert stream.stopped == bool(ends)


BROWSER = next(
    filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None
)


@pytest.mark.skipif(BROWSER is None, reason="no browser here: apt install chromium-headless-shell")
def test_page_in_a_browser(tmp_path):
    """In a real, headless browser, the page shows the server's numbers, the load of each rank, and a lost unit."""

    async def dom(url):
        words = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}")
        process = await asyncio.create_subprocess_exec(
            BROWSER,
            *words,
            "--virtual-time-budget=3000",
            "--dump-dom",
            url,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        return (await asyncio.wait_for(process.communicate(), 60))[0].decode()

    async def run():
        async with endpoint() as (router, _, url):
            work = load.prompts(["some text " * 20], Bytes(), 12, 30, 20, seed=3)
            await load.run(url, work, rate=500.0)
            before = await dom(url)
            router.decode.fail(PeerLost("decode unit: the process of rank 1 has ended", op="serve", peer=1))
            return before, await dom(url), router.times.tokens

    before, after, tokens = asyncio.run(run())
    shown = dict(re.findall(r'<b data-name="([^"]+)">([^<]*)</b>', before))
    assert (shown["finished"], shown["lost"], shown["tokens"]) == ("12", "0", str(tokens))
    assert re.fullmatch(r"\d+ ms", shown["first token, p50"])
    assert '<p id="state" class="">live</p>' in before
    assert len(re.findall(r'class="bar" style="width: [\d.]+%', before)) == 4
    assert re.search(r'<polyline id="line" points="[\d., ]{5,}"', before)
    assert "PeerLost" not in before
    assert "PeerLost: decode unit: the process of rank 1 has ended" in after


def test_openai_client():
    """The official client, with and without streaming."""
    openai = pytest.importorskip("openai", reason="openai is not installed: pip install openai")

    async def run():
        async with endpoint() as (_, _, url):
            client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none")
            models = [m.id async for m in client.models.list()]
            whole = await client.completions.create(model=models[0], prompt="hello", max_tokens=6)
            assert whole.choices[0].text == text_of("hello", 6)
            talk = [{"role": "user", "content": "hi"}]
            stream = await client.chat.completions.create(
                model=models[0], messages=talk, max_completion_tokens=6, stream=True
            )
            said = "".join([e.choices[0].delta.content or "" async for e in stream])
            assert said == text_of(chat_prompt(talk), 6)
            with pytest.raises(openai.BadRequestError, match="temperature"):
                await client.completions.create(model=models[0], prompt="a", temperature=1.0)
            await client.close()

    asyncio.run(run())
