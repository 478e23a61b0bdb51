"""A rank of the prefill unit: computes prompts in two overlapping micro-batches, and sends their KV to decode ranks."""

from __future__ import annotations

import torch

import moecomm
from moecomm.overlap import Started, two_batches

from ..cache import Cache
from .experts import PlacedExperts, swiglu
from .model import all_experts
from .parallel import AttentionGroup, most


class MicroBatch:
    """Prompts that are computed together, padded to one length. x has this rank's part of the tokens, [n, hidden]."""

    def __init__(self, model, group, prompts, dtype):
        self.prompts, self.group = prompts, group
        longest = max((len(p["tokens"]) for p in prompts), default=1)
        self.ids = torch.zeros((len(prompts), longest), dtype=torch.int64)
        self.positions = torch.full((len(prompts), longest), -1)
        for row, prompt in enumerate(prompts):
            length = len(prompt["tokens"])
            self.ids[row, :length] = torch.tensor(prompt["tokens"])
            self.positions[row, :length] = torch.arange(length)
        self.lengths = (self.positions >= 0).sum(1)
        self.real = self.positions >= 0
        self.cache = Cache(model.config, len(prompts), longest, dtype)
        self.span = model.span(
            self.ids.shape, self.cache, torch.arange(len(prompts)), self.positions, absorbed=False
        )
        self.x = group.mine(model.embed_tokens(self.ids[self.real]))
        self.tokens = self.out = self.rows = self.first = self.draft = None


class PrefillRank:
    """One rank of the prefill unit.

    Parameters
    ----------
    config : ServeConfig
    comm : Communicator
        The ranks of the unit.
    model : Model
        The whole model. The experts of other ranks are not used.
    handover : HandOver
        Writes KV to decode ranks.
    """

    def __init__(self, config, comm, model, handover):
        self.config, self.comm, self.model, self.handover = config, comm, model, handover
        c, tp = config.model, config.prefill.attention_tp
        tokens = max(config.prefill_tokens, config.max_len)
        self.experts = PlacedExperts(
            comm, config.prefill, all_experts(model, shared=False), c.num_groups, config.policy
        )
        shape = dict(
            hidden=c.hidden,
            num_experts=c.num_experts,
            top_k=c.top_k,
            max_tokens=most(tokens, tp),
            dtype=config.torch_dtype,
            placement=self.experts.placement,
        )
        self.buffer = self.experts.buffer = moecomm.Buffer(
            comm,
            **shape,
            replicas="optimal",
            monitor=self.experts.monitor,
            arena_bytes=self._arena(shape),
        )
        self.group = AttentionGroup(comm, tp, tokens, c.hidden, config.torch_dtype)
        self.group.split_heads(model)
        self.rows = 0
        self._stages = self._all_stages()

    def _arena(self, shape):
        """Arena size for two micro-batches."""
        shape = {**shape, "num_experts": self.experts.placement.num_slots}
        del shape["placement"]
        return moecomm.Buffer.arena_hint(self.comm, **shape, dispatches=4)

    def handle(self, message):
        """Answer one message of the router: compute the prompts of this rank's group. Collective."""
        plan = self.experts.change(message["placement"])
        self.rows = 0
        a, b = self._split(message["prompts"])
        done = two_batches(
            self._stages,
            *(MicroBatch(self.model, self.group, prompts, self.config.torch_dtype) for prompts in (a, b)),
        )
        first = {}
        for batch in done:
            for row, prompt in enumerate(batch.prompts):
                kv = batch.cache.data[:, row, : int(batch.lengths[row])]
                for rank in self._readers(prompt["rank"]):
                    self.handover.write(rank, prompt["slot"], kv)
                draft = None if batch.draft is None else int(batch.draft[row])
                first[prompt["number"]] = {"token": int(batch.first[row]), "draft": draft}
        return {
            "first": first if self.group.member == 0 else {},
            "rows": self.rows,
            "version": self.experts.placement.version,
            "moving": self.experts.moving,
            "plan": plan,
            "kv_bytes": self.handover.take_bytes(),
        }

    def _readers(self, group):
        """The ranks of a decode group to which this rank writes. All of them need the rows, and one member writes."""
        tp, mine = self.config.decode.attention_tp, self.config.prefill.attention_tp
        return [group * tp + i for i in range(tp) if i % mine == self.group.member]

    @staticmethod
    def _split(prompts):
        """Split prompts into two lists with about the same number of tokens."""
        halves, load = ([], []), [0, 0]
        for prompt in sorted(prompts, key=lambda p: -len(p["tokens"])):
            to = load.index(min(load))
            halves[to].append(prompt)
            load[to] += len(prompt["tokens"])
        return halves

    # Stages for two_batches. Each takes a MicroBatch and returns it, or a Started that returns it.

    def _all_stages(self):
        stages, placed = [], 0
        for i, block in enumerate(self.model.layers):
            stages += self._block_stages(block, i, placed)
            placed += block.has_experts
        stages.append(("first token", self._first_token))
        if self.config.speculative:
            stages += [
                ("join", self._join),
                *self._block_stages(self.model.mtp.block, len(self.model.layers), placed),
                ("draft", self._draft_token),
            ]
        return stages

    def _block_stages(self, block, layer, placed):
        def attend(b):
            b.x = b.group.attention(block, b.x, b.span, layer, b.real)
            b.tokens = block.post_attention_layernorm(b.x)
            if not block.has_experts:
                b.x = b.x + block.mlp(b.tokens)
            return b

        def dispatch(b):
            ids, weights, _ = block.mlp.gate(b.tokens)

            def arrived(out):
                b.out = out
                return b

            return Started(self.buffer.dispatch(b.tokens, ids, weights, layer=placed, async_op=True), arrived)

        def experts(b):
            w, first = self.experts.weights[placed], 0
            b.rows = b.out.handle.rows
            for slot, count in enumerate(b.out.tokens_per_expert.tolist()):
                if count:
                    part = slice(first, first + count)
                    swiglu(b.out.x[part], w["gate_up"][slot], w["down"][slot], b.rows[part])
                first += count
            self.rows += first
            return b

        def combine(b):
            pending = self.buffer.combine(
                b.rows, b.out.handle, topk_weights=b.out.topk_weights, async_op=True
            )
            rest = b.x
            if block.mlp.shared_experts is not None:
                rest = rest + block.mlp.shared_experts(b.tokens)

            def add(y):
                b.x, b.out, b.rows = rest + y, None, None
                return b

            return Started(pending, add)

        stages = [("attention", attend)]
        if block.has_experts:
            stages += [("dispatch", dispatch), ("experts", experts), ("combine", combine)]
        return stages

    def _first_token(self, b):
        b.x = self.model.norm(b.x)
        b.first = self._last_argmax(b, b.x)
        return b

    def _last_argmax(self, b, hidden):
        """The best token after each prompt, from this rank's part of the rows."""
        last, total = b.lengths.cumsum(0) - 1, int(b.lengths.sum())
        counts = [int(((last >= begin) & (last < end)).sum()) for begin, end in b.group.bounds(total)]
        begin, end = b.group.bounds(total)[b.group.member]
        here = last[(last >= begin) & (last < end)] - begin
        return self.model.lm_head(b.group.gather(hidden[here], counts)).argmax(-1)

    def _join(self, b):
        following = b.ids.roll(-1, 1)
        following[torch.arange(len(b.prompts)), b.lengths - 1] = b.first
        b.x = self.model.mtp.joined(b.x, self.model.embed_tokens(b.group.mine(following[b.real])))
        return b

    def _draft_token(self, b):
        b.draft = self._last_argmax(b, self.model.mtp.norm(b.x))
        return b
