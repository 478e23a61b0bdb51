"""Recorded loads for `python -m bench balance`: real text through gates that are trained for a few seconds.

A small language model predicts the next word of source files and docs of this machine. Its layers have 256 tiny
experts, top-8, and a gate of moecomm.gate that is balanced without an auxiliary loss. So its picks resemble real
ones: experts specialize, their popularity follows the text, and they are balanced only on average. After the training
the model reads other files, and a LoadMonitor counts the picks.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

import torch
from torch import nn
from torch.nn import functional

from moecomm.balance import LoadMonitor
from moecomm.gate import Gate, count_picks

from . import routing
from .balance_baseline import EXPERTS, TOP_K

LAYERS, HIDDEN, WORDS = 4, 64, 1024
STEPS, TOKENS, SPEED = 300, 512, 0.03
WINDOW = 48  # batches per reading
READINGS = 6


class Model(nn.Module):
    """Embedding, and layers that mix a word with the previous ones and add 8 of 256 experts of one neuron each."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, HIDDEN)
        self.mix = nn.ParameterList(torch.randn(4, HIDDEN) / 2 for _ in range(LAYERS))
        self.gates = nn.ModuleList(Gate(HIDDEN, EXPERTS, TOP_K) for _ in range(LAYERS))
        self.keys = nn.ParameterList(torch.randn(EXPERTS, HIDDEN) / HIDDEN**0.5 for _ in range(LAYERS))
        self.values = nn.ParameterList(torch.randn(EXPERTS, HIDDEN) / 4 for _ in range(LAYERS))

    def forward(self, words):
        """words [T] -> (logits of the next word [T, WORDS], picks [LAYERS, EXPERTS])."""
        x, counts = self.embedding(words), []
        for mix, gate, keys, values in zip(self.mix, self.gates, self.keys, self.values):
            x = functional.layer_norm(x, (HIDDEN,))
            x = x + sum(functional.pad(x, (0, 0, back, 0))[: len(x)] * mix[back] for back in range(len(mix)))
            normed = functional.layer_norm(x, (HIDDEN,))
            picked = gate(normed)
            strength = torch.relu(normed @ keys.T).gather(1, picked.topk_ids) * picked.topk_weights
            x = x + functional.embedding_bag(picked.topk_ids, values, per_sample_weights=strength, mode="sum")
            counts.append(count_picks(picked.topk_ids, EXPERTS))
        return functional.layer_norm(x, (HIDDEN,)) @ self.embedding.weight.T / HIDDEN**0.5, torch.stack(
            counts
        )


def stream(tokens):
    """Ids of `tokens` words of this machine's text. Frequent words have their own id; all others share one."""
    words = []
    for path in routing.text_files():
        words += routing.tokenize(path.read_text(errors="replace"))
        if len(words) >= tokens:
            break
    number = {w: i for i, (w, _) in enumerate(Counter(words).most_common(WORDS - 1))}
    return torch.tensor([number.get(words[i % len(words)], WORDS - 1) for i in range(tokens)])


@lru_cache
def readings():
    """([loads float64 [LAYERS, EXPERTS] of successive parts of a text], cross-entropy before and after training)."""
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # small matrices, and results that do not depend on the number of cores
    batches = stream((STEPS + READINGS * WINDOW) * (TOKENS + 1)).view(-1, TOKENS + 1)
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for batch in batches[:STEPS]:
        logits, counts = model(batch[:-1])
        loss = functional.cross_entropy(logits, batch[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for gate, picks in zip(model.gates, counts):
            gate.update_bias(picks, SPEED)
        losses.append(loss.item())
    loads, monitor = [], LoadMonitor(LAYERS, EXPERTS, window=WINDOW)
    with torch.no_grad():
        for reading in batches[STEPS:].view(READINGS, WINDOW, -1):
            monitor.reset()
            for batch in reading:
                for layer, picks in enumerate(model(batch[:-1])[1]):
                    monitor.record(layer, picks.numpy())
            loads.append(monitor.load(weighted=False).numpy())
    torch.set_rng_state(state)
    torch.set_num_threads(threads)
    return loads, sum(losses[:10]) / 10, sum(losses[-10:]) / 10


def recorded(seed):
    """Loads [LAYERS, EXPERTS] of a part of the text. The part of seed + 1 follows that of seed."""
    loads = readings()[0]
    return loads[seed % len(loads)]
