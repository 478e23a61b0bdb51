"""Units without a model: the next token is a function of the last token and the length."""

import asyncio

from examples.deepseek_v3.serve.router import Router
from examples.deepseek_v3.serve.units import Unit


def next_token(length, last):
    """Return a letter."""
    return 97 + (7 * last + 3 * length) % 26


def answer_to(prompt, count):
    """Return the tokens that the units generate."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(next_token(len(ids), ids[-1]))
    return ids[len(prompt) :]


class Echo(Unit):
    """Ranks that answer after a pause."""

    def __init__(self, name, size, pause=0.001):
        super().__init__(name, size, 10.0)
        self.pause, self.slots = pause, [{} for _ in range(size)]
        self.most = 0  # maximum number of concurrent sequences

    async def call(self, messages):
        if self.error is not None:
            raise self.error
        await asyncio.sleep(self.pause)
        if self.error is not None:
            raise self.error
        return [getattr(self, "_" + m["do"])(rank, m) for rank, m in enumerate(messages)]

    def _prefill(self, rank, message):
        first = {
            p["number"]: {"token": next_token(len(p["tokens"]), p["tokens"][-1]), "draft": None}
            for p in message["prompts"]
        }
        return {"first": first, "rows": len(first), "version": 0, "moving": None, "plan": None}

    def _step(self, rank, message):
        own, tokens = self.slots[rank], {}
        for number in message["drop"]:
            own.pop(number, None)
        for new in message["admit"]:
            assert new["slot"] not in [s["slot"] for s in own.values()], "two sequences in one slot"
            own[new["number"]] = {"slot": new["slot"], "length": new["length"] + 1, "last": new["token"]}
        for number, s in own.items():
            s["last"] = next_token(s["length"], s["last"])
            s["length"] += 1
            tokens[number] = [s["last"]]
        self.most = max(self.most, len(own))
        return {"tokens": tokens, "rows": len(own), "version": 0, "moving": None, "plan": None}


def echo_router(config, pause=0.001):
    """Make a Router over Echo units with the shapes of the config."""
    return Router(
        config, Echo("prefill", config.prefill.ranks, pause), Echo("decode", config.decode.ranks, pause)
    )
