"""Load generator: clients that stream completions over HTTP and measure latencies. Needs the package `aiohttp`."""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field

import aiohttp

from .log import percentiles


@dataclass
class Sample:
    """One request and its measurements."""

    prompt: list  # ids
    max_tokens: int
    sent: float = 0.0  # time at which it was sent
    tokens: list = field(default_factory=list)  # ids of the answer
    at: list = field(default_factory=list)  # time at which each token was received
    counted: int = 0  # tokens according to the server
    reason: str | None = None  # finish reason: "stop" or "length"
    error: str | None = None

    @property
    def lost(self):
        """Tokens that the server counted but the client did not receive, or that are missing to max_tokens."""
        due = self.counted if self.reason == "stop" else max(self.counted, self.max_tokens)
        return due - len(self.tokens) if self.error is None else 0


def prompts(texts, tokenizer, count, longest, max_tokens, seed):
    """Make (ids, tokens to generate) of `count` requests from parts of the texts, with random lengths.

    Half of the prompts are from one text, so that the picks of experts are skewed.
    """
    draw, out = random.Random(seed), []
    for i in range(count):
        text = texts[0] if i % 2 else draw.choice(texts)
        begin = draw.randrange(max(len(text) - longest, 1))
        ids = tokenizer.encode(text[begin : begin + longest])[: draw.randint(longest // 4 + 1, longest)]
        out.append((ids, draw.randint(max_tokens // 2, max_tokens)))
    return out


async def run(url, work, rate, seed=0, notify=None):
    """Send requests at random times, `rate` per second on average, independently of the answers.

    Parameters
    ----------
    url : str
        Address of the server, such as http://127.0.0.1:8000.
    work : list of (ids, max_tokens)
    rate : float
        Requests per second.
    seed : int
        Seed of the random times.

    Returns
    -------
    list of Sample
    """
    draw, samples = random.Random(seed), [Sample(ids, most) for ids, most in work]
    limits = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(timeout=limits, connector=aiohttp.TCPConnector(limit=0)) as session:
        tasks = []
        for sample in samples:
            tasks.append(asyncio.ensure_future(_send(session, url, sample)))
            await asyncio.sleep(draw.expovariate(rate))
        await asyncio.gather(*tasks)
    return samples


async def _send(session, url, sample):
    sample.sent = time.perf_counter()
    body = {
        "prompt": sample.prompt,
        "max_tokens": sample.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    try:
        async with session.post(f"{url}/v1/completions", json=body) as response:
            if response.status != 200:
                sample.error = (await response.json())["error"]["message"]
                return
            async for line in response.content:
                if line.startswith(b"data: {"):
                    _take(sample, json.loads(line[6:]))
    except (aiohttp.ClientError, asyncio.TimeoutError, ValueError) as error:
        sample.error = f"{type(error).__name__}: {error}"


def _take(sample, event):
    if "error" in event:
        sample.error = event["error"]["message"]
        return
    now = time.perf_counter()
    for choice in event["choices"]:
        ids = choice.get("token_ids") or []
        sample.tokens += ids
        sample.at += [now] * len(ids)
        sample.reason = choice.get("finish_reason") or sample.reason
    if event.get("usage"):
        sample.counted = event["usage"]["completion_tokens"]


def summary(samples):
    """Summarize: percentiles in seconds, tokens per second, failures and lost tokens."""
    done = [s for s in samples if s.error is None and s.at]
    begin, end = min((s.sent for s in samples), default=0), max((s.at[-1] for s in done), default=0)
    tokens = sum(len(s.tokens) for s in done)
    return {
        "requests": len(samples),
        "failed": len(samples) - len(done),
        "tokens": tokens,
        "lost_tokens": sum(s.lost for s in samples),
        "seconds": max(end - begin, 0.0),
        "tokens_per_second": tokens / (end - begin) if end > begin else 0.0,
        "ttft": percentiles([s.at[0] - s.sent for s in done]),
        "tpot": percentiles([(s.at[-1] - s.at[0]) / (len(s.at) - 1) for s in done if len(s.at) > 1]),
    }
