"""A training loop with batches from DataLoader workers.

mpirun -n 2 python tests/support/loading_worker.py fork|spawn     # prints the losses of each rank
"""

import sys

import torch
from torch.utils.data import DataLoader, Dataset

import moecomm


class Tokens(Dataset):
    """Regression data made by index. `comm` is a communicator that the dataset uses by mistake."""

    def __init__(self, rank, comm=None):
        self.rank, self.comm = rank, comm

    def __len__(self):
        return 24

    def __getitem__(self, i):
        if self.comm is not None:
            self.comm.barrier()
        x = torch.randn(16, generator=torch.Generator().manual_seed(1000 * self.rank + i))
        return x, x.flip(0)


def train(comm, method, careless=False):
    """Return the losses of two epochs; without workers if method is None."""
    buf = moecomm.Buffer(comm, hidden=16, num_experts=4, top_k=2, max_tokens=8, dtype=torch.float32)
    layer = moecomm.nn.MoE(16, 32, 4, 2, 1, buf)
    generator = torch.Generator().manual_seed(comm.rank)  # rank threads share torch's default generator
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=generator)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    workers = (
        {} if method is None else dict(num_workers=1, multiprocessing_context=method, persistent_workers=True)
    )
    loader = DataLoader(Tokens(comm.rank, comm if careless else None), batch_size=8, **workers)
    losses = []
    for _ in range(2):
        for x, y in loader:
            loss = (layer(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    comm.barrier()
    buf.close()
    return losses


if __name__ == "__main__":
    torch.set_num_threads(1)
    with moecomm.Communicator(ranks_per_node=1, timeout=60) as world:
        print(f"rank {world.rank}: {train(world, sys.argv[1])}")
