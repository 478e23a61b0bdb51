"""HTTP endpoint for OpenAI clients, and a page that shows the units. Needs the package `aiohttp`.

    POST /v1/completions, /v1/chat/completions      greedy; "stream": true sends server-sent events
    GET  /v1/models, /health, /stats, /             /stats has the data of the page as JSON

Parameters that would change the result of greedy decoding (temperature, top_p, n, penalties, log-probabilities) are
refused, not ignored. "return_token_ids": true adds the ids of the tokens to each choice.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from pathlib import Path

from aiohttp import web

from moecomm import InvalidArgument, MoecommError

from .text import TextStream, chat_prompt

# {name: values that are allowed, because they mean greedy decoding of one answer}
NEUTRAL = {
    "temperature": (None, 0),
    "top_p": (None, 1),
    "n": (None, 1),
    "best_of": (None, 1),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "suffix": (None, ""),
    "tools": (None, []),
}


class BadRequest(Exception):
    """A request of a client is invalid. param: the name of the field."""

    def __init__(self, message, param):
        super().__init__(message)
        self.param = param


class Endpoint:
    """The web application of a router.

    Parameters
    ----------
    router : Router
    tokenizer : Bytes or Tokenizer
    name : str
        Name of the model for clients.
    """

    def __init__(self, router, tokenizer, name="deepseek-v3-mini"):
        self.router, self.tokenizer, self.name = router, tokenizer, name
        self._numbers, self._begin = itertools.count(), int(time.time())
        self.app = web.Application(client_max_size=1 << 24)
        self.app.add_routes(
            [
                web.get("/", self._page),
                web.get("/health", self._health),
                web.get("/stats", self._stats),
                web.get("/v1/models", self._models),
                web.get("/v1/models/{name}", self._model),
                web.post("/v1/completions", self._completions),
                web.post("/v1/chat/completions", self._chat),
            ]
        )

    @contextlib.asynccontextmanager
    async def listening(self, host="127.0.0.1", port=0):
        """Serve HTTP. Yields the port."""
        runner = web.AppRunner(self.app, handler_cancellation=True, shutdown_timeout=1.0)
        await runner.setup()
        try:
            site = web.TCPSite(runner, host, port)
            await site.start()
            yield site._server.sockets[0].getsockname()[1]
        finally:
            await runner.cleanup()

    async def _page(self, _):
        return web.FileResponse(Path(__file__).with_name("page.html"))

    async def _health(self, _):
        failed = [u for u in (self.router.prefill, self.router.decode) if u.error is not None]
        if failed:
            return _error(failed[0].error)
        return web.json_response({"status": "ok"})

    async def _stats(self, _):
        return web.json_response(self.router.stats())

    def _about(self):
        return {"id": self.name, "object": "model", "created": self._begin, "owned_by": "moecomm"}

    async def _models(self, _):
        return web.json_response({"object": "list", "data": [self._about()]})

    async def _model(self, request):
        if request.match_info["name"] != self.name:
            return _refusal(
                f"model is {request.match_info['name']!r}; expected {self.name!r}",
                "model",
                404,
                "model_not_found",
            )
        return web.json_response(self._about())

    async def _completions(self, request):
        return await self._answer(request, Completion)

    async def _chat(self, request):
        return await self._answer(request, Chat)

    async def _answer(self, request, kind):
        requests = []
        try:
            body = await self._read(request)
            prompts, most = kind.prompts(body, self.tokenizer)
            answer = kind(f"{kind.prefix}-{next(self._numbers)}", int(time.time()), self.name)
            stop = body.get("stop") or []
            stop = [stop] if isinstance(stop, str) else stop
            if not isinstance(stop, list) or not all(isinstance(s, str) for s in stop):
                raise BadRequest(f"stop is {stop!r}; expected a string or a list of strings", "stop")
            for prompt in prompts:
                left = max(self.router.config.max_len - len(prompt), 1)
                eos = () if self.tokenizer.eos is None else (self.tokenizer.eos,)
                requests.append(self.router.submit(prompt, left if most is None else most, eos))
            choices = [
                Choice(self.router, r, TextStream(self.tokenizer, stop), bool(body.get("return_token_ids")))
                for r in requests
            ]
            if body.get("stream"):
                return await self._send_events(request, answer, choices, body)
            await asyncio.gather(*(choice.complete() for choice in choices))
            return web.json_response(
                {**answer.whole([c.whole(answer) for c in choices]), "usage": _usage(requests)}
            )
        except BadRequest as error:
            return _refusal(str(error), error.param)
        except InvalidArgument as error:
            param = str(error).partition(" ")[0]  # the texts of Router.submit begin with the name
            return _refusal(
                str(error), param, code="context_length_exceeded" if param == "max_tokens" else None
            )
        except MoecommError as error:
            return _error(error)
        finally:
            for r in requests:  # the client has disconnected, or another prompt was refused
                if not r.done:
                    self.router.cancel(r)

    async def _read(self, request):
        try:
            body = await request.json()
        except ValueError:
            raise BadRequest("the body is not JSON; expected a JSON object", None) from None
        if not isinstance(body, dict):
            raise BadRequest("the body is not a JSON object; expected one", None)
        for name, allowed in NEUTRAL.items():
            if body.get(name) not in allowed:
                raise BadRequest(
                    f"{name} is {body[name]!r}; expected {allowed[-1]!r}, because this server decodes greedily, with "
                    "one answer per prompt",
                    name,
                )
        if body.get("model", self.name) != self.name:
            raise BadRequest(f"model is {body['model']!r}; expected {self.name!r}", "model")
        return body

    async def _send_events(self, request, answer, choices, body):
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
        )
        await response.prepare(request)
        lock = asyncio.Lock()

        async def send(event):
            async with lock:
                await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")

        async def run(index, choice):
            await send_all(answer.opening(index))
            async for text, ids, reason in choice.pieces():
                await send(answer.piece(index, text, ids, reason))

        async def send_all(events):
            for event in events:
                await send(event)

        try:
            await asyncio.gather(*(run(i, c) for i, c in enumerate(choices)))
        except MoecommError as error:  # the status has been sent, so the error is an event
            await send({"error": _words(error)})
            return response
        if (body.get("stream_options") or {}).get("include_usage"):
            await send({**answer.chunk([]), "usage": _usage([c.request for c in choices])})
        await response.write(b"data: [DONE]\n\n")
        return response


class Choice:
    """One answer that is being generated."""

    def __init__(self, router, request, text, with_ids):
        self.request, self._router, self._text, self._with_ids = request, router, text, with_ids
        self._collected = []

    async def pieces(self):
        """Yield (text, ids or None, finish reason or None) as they are generated."""
        async for ids in self._router.stream(self.request):
            last = self.request.done and self.request.news.empty()
            piece = self._text.feed(ids, last)
            if self._text.stopped:
                self._router.cancel(self.request)
                last = True
            reason = self._reason() if last else None
            if piece or reason or self._with_ids:
                yield piece, ids if self._with_ids else None, reason
            if last:
                return

    def _reason(self):
        return "stop" if self._text.stopped else self.request.finish_reason

    async def complete(self):
        """Wait until the answer is complete."""
        self._collected = [piece async for piece in self.pieces()]

    def whole(self, answer):
        """Arguments of _choice for an answer that is not streamed, after complete()."""
        text = "".join(piece for piece, _, _ in self._collected)
        ids = list(itertools.chain(*(i or [] for _, i, _ in self._collected))) if self._with_ids else None
        return answer.body(text), ids, self._reason()


class Completion:
    """Format of /v1/completions."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, number, created, model):
        self._head = {"id": number, "created": created, "model": model}

    @staticmethod
    def prompts(body, tokenizer):
        """(lists of ids, maximum tokens of each answer or None)."""
        prompt, most = body.get("prompt"), body.get("max_tokens", 16)
        single = isinstance(prompt, str) or (
            isinstance(prompt, list) and prompt and all(isinstance(p, int) for p in prompt)
        )
        prompts = [prompt] if single else prompt
        valid = (
            isinstance(prompts, list) and prompts and all(isinstance(p, (str, list)) and p for p in prompts)
        )
        if not valid:
            raise BadRequest(
                f"prompt is {str(prompt)[:60]!r}; expected a string, a list of token ids, or a list of these",
                "prompt",
            )
        return [tokenizer.encode(p) if isinstance(p, str) else p for p in prompts], _count("max_tokens", most)

    def body(self, text):
        """The field of a choice with the text."""
        return {"text": text}

    def opening(self, index):
        """Events before the first piece."""
        return []

    def chunk(self, choices):
        """An event."""
        return {**self._head, "object": self.chunk_kind, "choices": choices}

    def piece(self, index, text, ids, reason):
        """The event of a piece of text."""
        return self.chunk([_choice(index, self.body(text), ids, reason)])

    def whole(self, choices):
        """An answer that is not streamed."""
        made = [_choice(i, *choice) for i, choice in enumerate(choices)]
        return {**self._head, "object": self.kind, "choices": made}


class Chat(Completion):
    """Format of /v1/chat/completions."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    @staticmethod
    def prompts(body, tokenizer):
        """(list with one list of ids, maximum tokens of the answer or None)."""
        messages = body.get("messages")
        try:
            if not messages:
                raise TypeError
            text = chat_prompt(messages)
        except (TypeError, KeyError):
            raise BadRequest(
                "messages is invalid; expected a list of {role, content} with text contents", "messages"
            ) from None
        most = body.get("max_completion_tokens", body.get("max_tokens"))
        return [tokenizer.encode(text)], _count("max_tokens", most)

    def body(self, text):
        """The field of a choice with the text."""
        return {"message": {"role": "assistant", "content": text}}

    def opening(self, index):
        """Events before the first piece."""
        return [self.chunk([_choice(index, {"delta": {"role": "assistant", "content": ""}}, None, None)])]

    def piece(self, index, text, ids, reason):
        """The event of a piece of text."""
        return self.chunk([_choice(index, {"delta": {"content": text}}, ids, reason)])


def _choice(index, body, ids, reason):
    more = {} if ids is None else {"token_ids": ids}
    return {"index": index, **body, "logprobs": None, "finish_reason": reason, **more}


def _count(name, value):
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise BadRequest(f"{name} is {value!r}; expected an integer >= 1", name)
    return value


def _usage(requests):
    prompt, completion = sum(len(r.prompt) for r in requests), sum(len(r.tokens) for r in requests)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def _words(error):
    return {"message": str(error), "type": type(error).__name__, "param": None, "code": "unit_failed"}


def _error(error):
    return web.json_response({"error": _words(error)}, status=503)


def _refusal(message, param, status=400, code=None):
    words = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    return web.json_response({"error": words}, status=status)
