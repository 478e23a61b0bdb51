"""Attention of several ranks: tensor parallel over heads, sequence parallel over tokens.

The ranks of a group serve the same sequences. Each rank has a part of the heads, and the whole cache, because latent
attention stores nothing per head. Between two attentions each rank has a part of the tokens: it normalizes them and
sends them to their experts, so no token is sent twice. Before attention the ranks gather all tokens; after it each
rank receives the sum over heads for its own tokens (reduce-scatter). Source: technical report, section 3.4.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch

from moecomm.fabric import Domain

from ..attention import MLA


class AttentionGroup:
    """The ranks that compute attention together. Construction is collective over the unit.

    Each exchange writes into one of two boxes, alternately, and signals. A rank takes part in the next exchange after
    it has read this one. So a box is free again when all signals of the next exchange are here.

    Parameters
    ----------
    comm : Communicator
        The ranks of the unit. A group is `size` consecutive ones.
    size : int
        Number of ranks in a group. 1: nothing is exchanged.
    tokens : int
        Maximum number of tokens of a group.
    hidden : int
    dtype : torch.dtype
    """

    def __init__(self, comm, size, tokens, hidden, dtype):
        self.size, self.member, self.first = size, comm.rank % size, comm.rank // size * size
        self.number, self.domain = 0, None
        if size > 1:
            shape = (2, size, most(tokens, size), hidden)
            self.domain = Domain(comm, 2 * size * shape[2] * hidden * dtype.itemsize + 4096, counters=1)
            self._box = self.domain.tensor(shape, dtype)

    def bounds(self, count):
        """Begin and end of each member's part of `count` tokens."""
        ends = [count * i // self.size for i in range(self.size + 1)]
        return list(pairwise(ends))

    def mine(self, rows):
        """This rank's part of the rows of all tokens."""
        begin, end = self.bounds(len(rows))[self.member]
        return rows[begin:end]

    def gather(self, rows, counts):
        """Rows of all members, in order; counts has the number of rows of each. Collective over the group."""
        if self.size == 1:
            return rows
        return torch.cat(self._exchange([rows] * self.size, counts))

    def gather_parts(self, rows, count):
        """As gather, for the parts of `count` tokens."""
        return self.gather(rows, [end - begin for begin, end in self.bounds(count)])

    def reduce_scatter(self, rows):
        """Sum the members' rows of all tokens; return the sum for this rank's part. Collective over the group."""
        if self.size == 1:
            return rows
        parts = [rows[begin:end] for begin, end in self.bounds(len(rows))]
        return torch.stack(self._exchange(parts, [len(parts[self.member])] * self.size)).sum(0)

    def _exchange(self, parts, counts):
        """Send parts[i] to member i; return what each member has sent to this rank, counts[i] rows."""
        box, self.number = self._box[self.number % 2], self.number + 1
        others = [i for i in range(self.size) if i != self.member]
        for i in others:
            if len(parts[i]):
                self.domain.write(self.first + i, box[self.member, : len(parts[i])], parts[i].contiguous())
            self.domain.signal(self.first + i, 0)
        for i in others:
            self.domain.wait(self.first + i, 0, self.number)
        return [parts[i] if i == self.member else box[i, :count].clone() for i, count in enumerate(counts)]

    def attention(self, block, x, span, layer, real):
        """Attention of this rank's tokens x [n, hidden], with the residual. Collective over the group.

        Parameters
        ----------
        block : Block
            Its attention has the heads of this rank.
        x : Tensor [n, hidden]
        span : Span
            Of all tokens of the group, with padding.
        layer : int
        real : bool Tensor [B, S]
            Tokens that are not padding.
        """
        rows = self.gather_parts(block.input_layernorm(x), int(real.sum()))
        padded = rows.new_zeros(*real.shape, rows.shape[1])
        padded[real] = rows
        return x + self.reduce_scatter(block.attend(padded, span, layer)[real])

    def close(self):
        """Release the boxes. Local."""
        if self.domain is not None:
            self.domain.close()

    def split_heads(self, model):
        """Replace the attention of all blocks of a model by this rank's part of the heads."""
        if self.size == 1:
            return
        for block in [*model.layers, *([model.mtp.block] if model.mtp is not None else [])]:
            block.self_attn = part_of_heads(block.self_attn, self.member, self.size)


def part_of_heads(whole, member, size):
    """Make the MLA with one of `size` equal parts of the heads of another. Outputs of all parts sum to its output."""
    part = MLA(replace(whole.config, heads=whole.config.heads // size))
    weights = whole.state_dict()
    for name, axis in (("q_b_proj", 0), ("kv_b_proj", 0), ("o_proj", 1)):
        weights[f"{name}.weight"] = weights[f"{name}.weight"].chunk(size, axis)[member].contiguous()
    part.load_state_dict(weights, assign=True)
    return part.requires_grad_(False).eval()


def most(tokens, size):
    """Maximum number of tokens of a rank in a group."""
    return -(-tokens // size)
