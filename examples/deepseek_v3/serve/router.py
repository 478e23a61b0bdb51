"""The router: accepts requests, and sends prompts to the prefill unit and sequences to the decode unit.

Continuous batching: every decode step processes all active sequences. A new sequence joins between two steps, as soon
as its prompt is in a slot of a decode rank's cache. A sequence that ends frees its slot. Both units run concurrently:
while the decode unit generates tokens, the prefill unit computes the next prompts.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import Counter, deque
from dataclasses import dataclass, field

from moecomm import InvalidArgument, MoecommError

from .log import Times, UnitLog
from .units import copy_of, error_to_json


@dataclass(eq=False)
class Request:
    """One request. Times are those of time.perf_counter()."""

    number: int
    prompt: list  # ids
    max_tokens: int  # limit of the generated tokens
    stop: frozenset  # ids that end the answer, as its last token
    tokens: list = field(default_factory=list)  # generated ids
    came: float = 0.0  # time at which it was submitted
    at: list = field(default_factory=list)  # time at which each token was generated
    slot: tuple | None = None  # (decode rank, slot)
    prefill_rank: int | None = None
    draft: int | None = None
    done: bool = False
    canceled: bool = False
    versions: set = field(default_factory=set)  # (unit, version) of the placements used for its tokens
    news: asyncio.Queue = field(default_factory=asyncio.Queue)

    @property
    def finish_reason(self):
        """Finish reason of OpenAI: "stop" or "length"."""
        return "stop" if self.tokens and self.tokens[-1] in self.stop else "length"


class Router:
    """Routes requests to two units.

    Parameters
    ----------
    config : ServeConfig
    prefill, decode : Unit
    """

    def __init__(self, config, prefill, decode):
        self.config, self.prefill, self.decode = config, prefill, decode
        self.waiting, self.ready, self.active = deque(), [], {}
        # Requests go to groups of ranks that have the same sequences: "rank" is the number of a group below.
        self._groups = {name: getattr(config, name).groups for name in ("prefill", "decode")}
        self.free = [list(range(config.slots)) for _ in range(self._groups["decode"])]
        # sequences to remove in the next step, by decode group
        self._dropped = [[] for _ in range(self._groups["decode"])]
        self._numbers = itertools.count()
        self._written = Counter()  # {(prefill rank, (decode rank, slot)): number of prompts}
        self._work = {name: asyncio.Event() for name in ("prefill", "decode")}
        self._tasks = []
        self._prefilling = []  # requests whose prompts are being computed
        self.prefill_log, self.decode_log = (
            UnitLog(config.rebalance_seconds),
            UnitLog(config.rebalance_seconds),
        )
        self.times = Times()
        self.finished = self.refused = self.lost = 0  # numbers of requests; lost: ended by a failure

    def start(self):
        """Begin to serve. The units must be ready."""
        self._tasks = [
            *(asyncio.ensure_future(self._run(work)) for work in (self._run_prefill, self._run_decode)),
            *(asyncio.ensure_future(self._watch(unit)) for unit in (self.prefill, self.decode)),
        ]

    async def close(self):
        """Stop. Unfinished requests end with a MoecommError."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        left = [*self.waiting, *self._prefilling, *self.ready, *self.active.values()]
        self._end(left, MoecommError("serve: the router was closed", op="serve"))

    def submit(self, prompt, max_tokens, stop=()):
        """Submit a request.

        Parameters
        ----------
        prompt : list of int
            Token ids.
        max_tokens : int
            Limit of the generated tokens. Together with the prompt at most config.max_len.
        stop : iterable of int
            Ids after which the answer ends.

        Returns
        -------
        Request

        Raises
        ------
        InvalidArgument
            The prompt is empty, contains an id out of range, or is too long.
        MoecommError
            A unit has failed.
        """
        for unit in (self.prefill, self.decode):
            if unit.error is not None:
                self.refused += 1
                raise copy_of(unit.error)
        limit, vocabulary = self.config.max_len, self.config.vocabulary
        if not prompt or any(not isinstance(t, int) or not 0 <= t < vocabulary for t in prompt):
            raise InvalidArgument(
                f"prompt is {prompt[:8]}; expected at least one token id in 0..{vocabulary - 1}",
                op="submit",
            )
        if max_tokens < 1 or len(prompt) + max_tokens > limit:
            raise InvalidArgument(
                f"max_tokens is {max_tokens} and the prompt has {len(prompt)} tokens; expected max_tokens >= 1, and at "
                f"most {limit} tokens together",
                op="submit",
            )
        request = Request(next(self._numbers), list(prompt), max_tokens, frozenset(stop))
        request.came = time.perf_counter()
        self.waiting.append(request)
        self._work["prefill"].set()
        return request

    async def stream(self, request):
        """Yield the tokens of a request as they are generated: lists of ids.

        Raises
        ------
        MoecommError
            A unit failed before the request was complete.
        """
        while True:
            news = await request.news.get()
            if isinstance(news, Exception):
                raise news
            if news:
                yield news
            if request.done and request.news.empty():
                return

    def cancel(self, request):
        """Cancel a request. Its slot is free after the next step."""
        request.canceled = True
        if request in self.waiting:
            self.waiting.remove(request)
            request.done = True
            request.news.put_nowait([])

    def stats(self):
        """Statistics for the page and the terminal, in types that JSON supports."""
        units = {}
        for unit, log in ((self.prefill, self.prefill_log), (self.decode, self.decode_log)):
            error = None if unit.error is None else error_to_json(unit.error)
            units[unit.name] = {"ranks": unit.size, "error": error, **log.summary()}
        return {
            "requests": {
                "waiting": len(self.waiting),
                "prefill": len(self._prefilling),
                "decode": len(self.ready) + len(self.active),
                "finished": self.finished,
                "refused": self.refused,
                "lost": self.lost,
            },
            "slots": {"free": [len(f) for f in self.free], "of": self.config.slots},
            **self.times.summary(),
            "units": units,
        }

    async def _call(self, unit, messages):
        """Send the message of each group to all its ranks; return the answers of all ranks."""
        times = unit.size // len(messages)
        return await unit.call([message for message in messages for _ in range(times)])

    # The prefill unit.

    async def _run_prefill(self):
        while True:
            batch = self._prefilling = self._choose()
            if not batch:
                self._work["prefill"].clear()
                await self._work["prefill"].wait()
                continue
            placement = self.prefill_log.placement_step()
            messages = [
                {"do": "prefill", "prompts": [], "placement": placement}
                for _ in range(self._groups["prefill"])
            ]
            for request in batch:
                rank, slot = request.slot
                self._written[request.prefill_rank, request.slot] += 1
                messages[request.prefill_rank]["prompts"].append(
                    {"number": request.number, "tokens": request.prompt, "rank": rank, "slot": slot}
                )
            begin = time.perf_counter()
            answers = await self._call(self.prefill, messages)
            self.prefill_log.add(begin, placement, answers, sum(len(r.prompt) for r in batch))
            first = {int(n): news for answer in answers for n, news in answer["first"].items()}
            for request in batch:
                request.draft = first[request.number]["draft"]
                request.versions.add(("prefill", answers[0]["version"]))
                if self._take(request, [first[request.number]["token"]]):
                    self.ready.append(request)
            self._prefilling = []
            if self.decode.error is not None:
                self._end_requests_of(self.decode)
            self._work["decode"].set()

    def _choose(self):
        """Choose the next batch in the order of arrival, within free slots and prefill_tokens per rank."""
        batch, load = [], [0] * self._groups["prefill"]
        while self.waiting:
            request = self.waiting[0]
            rank = max(range(len(self.free)), key=lambda r: len(self.free[r]))
            at = min(range(len(load)), key=lambda r: load[r])
            if not self.free[rank] or (
                load[at] and load[at] + len(request.prompt) > self.config.prefill_tokens
            ):
                break
            load[at] += len(request.prompt)
            request.slot, request.prefill_rank = (rank, self.free[rank].pop(0)), at
            batch.append(self.waiting.popleft())
        return batch

    # The decode unit.

    async def _run_decode(self):
        while True:
            if not self.active and not self.ready:
                self._work["decode"].clear()
                await self._work["decode"].wait()
                continue
            placement = self.decode_log.placement_step()
            messages = [
                {"do": "step", "admit": [], "drop": drop, "placement": placement} for drop in self._dropped
            ]
            self._dropped = [[] for _ in self._dropped]
            joining, self.ready = self.ready, []
            for request in joining:
                self.active[request.number] = request
                rank, slot = request.slot
                messages[rank]["admit"].append(
                    {
                        "number": request.number,
                        "slot": slot,
                        "source": request.prefill_rank,
                        "written": self._written[request.prefill_rank, request.slot],
                        "length": len(request.prompt),
                        "token": request.tokens[-1],
                        "draft": request.draft,
                    }
                )
            begin = time.perf_counter()
            answers = await self._call(self.decode, messages)
            self.decode_log.add(begin, placement, answers, len(self.active))
            for answer in answers:
                for number, tokens in answer["tokens"].items():
                    request = self.active[int(number)]
                    request.versions.add(("decode", answer["version"]))
                    if not self._take(request, tokens):
                        del self.active[request.number]

    def _take(self, request, tokens):
        """Pass on generated tokens; return whether the request continues."""
        now, kept = time.perf_counter(), []
        for token in tokens:
            if not request.done:
                kept.append(token)
                request.tokens.append(token)
                request.at.append(now)
                request.done = len(request.tokens) >= request.max_tokens or token in request.stop
        request.done = request.done or request.canceled
        if request.done:
            rank, slot = request.slot
            self._dropped[rank].append(request.number)
            self.free[rank].append(slot)
            self.finished += 1
            self.times.finish(request)
            self._work["prefill"].set()
        self.times.count(now, len(kept))
        request.news.put_nowait(kept)
        return not request.done

    # Failures.

    async def _run(self, work):
        with contextlib.suppress(MoecommError):  # the unit has failed: _watch ends its requests
            await work()

    async def _watch(self, unit):
        await unit.watch()
        self._end_requests_of(unit)

    def _end_requests_of(self, unit):
        """End all requests in a failed unit, and those that wait. The other unit ends its own requests."""
        lost = [*self.waiting, *(self._prefilling if unit is self.prefill else [])]
        self.waiting.clear()
        if unit is self.decode:
            lost += [*self.ready, *self.active.values()]
            self.ready, self.active = [], {}
        self._end(lost, unit.error)

    def _end(self, requests, error):
        for request in requests:
            if not request.done:
                request.done = True
                self.lost += 1
                request.news.put_nowait(copy_of(error))
