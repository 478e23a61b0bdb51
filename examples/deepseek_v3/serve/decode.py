"""A rank of the decode unit. Each step generates one token per sequence, or two if the draft was accepted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

import moecomm

from ..cache import Cache
from .experts import PlacedExperts, swiglu
from .model import all_experts, expert_layers
from .parallel import AttentionGroup, most


class DecodeMoE(nn.Module):
    """Mixture-of-Experts layer on the decode path. The shared expert is one more pick, with weight 1.

    Parameters
    ----------
    moe : OneProcess
        Provides the gate and, if the shared expert is not routed, the shared experts.
    rank : DecodeRank
    layer : int
        Index of the layer in the placement.
    """

    def __init__(self, moe, rank, layer):
        super().__init__()
        self.gate, self.layer, self._rank = moe.gate, layer, rank
        self.shared_expert_id = moe.experts.count if rank.config.shared_pick else None
        self.shared_experts = None if rank.config.shared_pick else moe.shared_experts

    def forward(self, x, with_routing=False):
        """[..., hidden] -> [..., hidden]. Collective."""
        tokens = x.reshape(-1, x.shape[-1])
        routing = self.gate(tokens)
        ids, weights = routing.topk_ids, routing.topk_weights
        if self.shared_expert_id is not None:
            ids = torch.cat((ids, ids.new_full((len(ids), 1), self.shared_expert_id)), 1)
            weights = torch.cat((weights, weights.new_ones((len(weights), 1))), 1)
        y = self._rank.exchange(self.layer, tokens.contiguous(), ids, weights)
        if self.shared_experts is not None:
            y = y + self.shared_experts(tokens)
        y = y.view(x.shape)
        return (y, routing) if with_routing else y


@dataclass
class Sequence:
    """A request in its slot: number of tokens in the cache, the next token, and the draft of the token after it."""

    slot: int
    length: int
    token: int
    draft: int | None


class DecodeRank:
    """One rank of the decode unit.

    Parameters
    ----------
    config : ServeConfig
    comm : Communicator
        The ranks of the unit.
    model : Model
        The whole model. Its layers with experts are replaced.
    handover : HandOver
        Provides the memory of the cache, to which prefill ranks write.
    """

    def __init__(self, config, comm, model, handover):
        self.config, self.comm, self.model, self.handover = config, comm, model, handover
        c, tp = config.model, config.decode.attention_tp
        width = 1 + config.speculative
        self.experts = PlacedExperts(
            comm, config.decode, all_experts(model, shared=config.shared_pick), policy=config.policy
        )
        self.buffer = self.experts.buffer = moecomm.Buffer(
            comm,
            hidden=c.hidden,
            num_experts=self.experts.num_experts,
            top_k=c.top_k + config.shared_pick,
            max_tokens=most(config.slots * width, tp),
            dtype=config.torch_dtype,
            decode=True,
            placement=self.experts.placement,
            replicas="even",
            monitor=self.experts.monitor,
        )
        for layer, moe in enumerate(expert_layers(model)):
            for block in [*model.layers, model.mtp and model.mtp.block]:
                if block is not None and block.mlp is moe:
                    block.mlp = DecodeMoE(moe, self, layer)
        self.group = AttentionGroup(comm, tp, config.slots * width, c.hidden, config.torch_dtype)
        self.group.split_heads(model)
        self.cache = Cache(c, config.slots, cache_length(config), config.torch_dtype, handover.memory)
        self.sequences = {}
        self.rows = 0

    def exchange(self, layer, tokens, ids, weights):
        """Send tokens [T, hidden] to their experts and back: [T, hidden]. Collective."""
        received, arrive = self.buffer.decode_dispatch(tokens, ids, quant=None, layer=layer)
        arrive()
        w, rows = self.experts.weights[layer], received.handle.rows
        for slot, count in enumerate(received.counts.tolist()):
            if count:
                swiglu(received.x[slot, :count], w["gate_up"][slot], w["down"][slot], rows[slot, :count])
                self.rows += count
        y, complete = self.buffer.decode_combine(rows, ids, weights, received.handle)
        complete()
        return y

    def handle(self, message):
        """Answer one message of the router: remove and add sequences, then run a step for all. Collective."""
        for number in message["drop"]:
            self.sequences.pop(number, None)
        for new in message["admit"]:
            source = writer_of(self.config, new["source"], self.group.member)
            self.handover.wait(source, new["slot"], new["written"])
            self.sequences[new["number"]] = Sequence(new["slot"], new["length"], new["token"], new["draft"])
        plan = self.experts.change(message["placement"])
        self.rows = 0
        tokens, accepted = self._step(list(self.sequences.values()))
        speaks = self.group.member == 0  # all ranks of a group have the same sequences
        return {
            "tokens": dict(zip(self.sequences, tokens, strict=True)) if speaks else {},
            "accepted": accepted if speaks else 0,
            "drafted": len(tokens) if self.config.speculative and speaks else 0,
            "rows": self.rows,
            "version": self.experts.placement.version,
            "moving": self.experts.moving,
            "plan": plan,
        }

    def _step(self, sequences):
        """Run a step; return the new tokens of each sequence, and the number of accepted drafts."""
        width = 1 + self.config.speculative
        slots = torch.tensor([s.slot for s in sequences], dtype=torch.int64)
        first = torch.tensor([s.length for s in sequences], dtype=torch.int64)
        positions = first[:, None] + torch.arange(width)
        ids = torch.tensor([[s.token, s.draft][:width] for s in sequences], dtype=torch.int64).view(-1, width)
        x = self.group.mine(self.model.embed_tokens(ids.flatten()))
        real = torch.ones_like(positions, dtype=torch.bool)
        span = self.model.span(ids.shape, self.cache, slots, positions)
        for layer, block in enumerate(self.model.layers):
            x = self._block(block, x, span, layer, real)
        hidden = self.group.gather_parts(self.model.norm(x), ids.numel())
        chosen = self.model.lm_head(hidden).argmax(-1).view(-1, width)
        if not self.config.speculative:
            for s, token in zip(sequences, chosen[:, 0].tolist(), strict=True):
                s.length, s.token = s.length + 1, token
            return chosen.tolist(), 0
        right = chosen[:, 0] == ids[:, 1]
        # MTP reads certain tokens only: the second token only if the draft was accepted.
        certain = torch.stack((torch.ones_like(right), right), 1)
        drafts = self._drafts(hidden, chosen, slots, positions, certain)
        tokens = []
        for row, s in enumerate(sequences):
            count = 1 + int(right[row])
            tokens.append(chosen[row, :count].tolist())
            s.length, s.token, s.draft = s.length + count, tokens[-1][-1], int(drafts[row, count - 1])
        return tokens, int(right.sum())

    def _block(self, block, x, span, layer, real):
        """One block on this rank's tokens [n, hidden]. Collective."""
        x = self.group.attention(block, x, span, layer, real)
        return x + block.mlp(block.post_attention_layernorm(x))

    def _drafts(self, hidden, chosen, slots, positions, certain):
        """Drafts of MTP after the certain tokens: ids [B, S]. Collective."""
        mtp = self.model.mtp
        span = self.model.span(chosen.shape, self.cache, slots, positions.masked_fill(~certain, -1))
        embedded = self.model.embed_tokens(chosen[certain])
        x = mtp.joined(self.group.mine(hidden[certain.flatten()]), self.group.mine(embedded))
        x = self._block(mtp.block, x, span, len(self.model.layers), certain)
        drafts = torch.zeros_like(chosen)
        last = self.group.gather_parts(mtp.norm(x), int(certain.sum()))
        drafts[certain] = self.model.lm_head(last).argmax(-1)
        return drafts


def writer_of(config, group, member):
    """The prefill rank of a group that writes to this member of a decode group."""
    tp = config.prefill.attention_tp
    return group * tp + member % tp


def cache_length(config):
    """Rows of a slot, including one for a draft after the last token."""
    return config.max_len + 1 + config.speculative
