"""Sums a table over the ranks of a Domain: every rank sums a part, and multicasts it to all."""

from __future__ import annotations

import torch

from ..errors import ConfigMismatch
from ..fabric import Domain, Multicast, Reduce


def sum_over_ranks(domain: Domain, table: torch.Tensor, same: dict[str, int]) -> torch.Tensor:
    """Return the sum over ranks of a float64 table. Collective. Equal bits on all ranks.

    Parameters
    ----------
    domain : Domain
        With free memory for two such tables.
    table : Tensor float64 on the host
        Of the same shape on all ranks.
    same : dict of numbers below 2**26
        Must be equal on all ranks. They travel with the table, so that no other exchange is needed.

    Raises
    ------
    ConfigMismatch
        Ranks have different numbers in `same`, or tables of different sizes.
    CapacityExceeded
        The domain has not enough free memory.
    """
    size, ranks, own = domain.size, range(domain.size), domain.rank
    values = torch.tensor(list(same.values()), dtype=torch.float64, device="cpu")
    row = torch.cat([values, values**2, table.flatten()])
    part = -(-len(row) // size)
    row = torch.nn.functional.pad(row, (0, size * part - len(row)))

    tables = domain.tensor((2, size, part), torch.float64)
    mine, total = tables
    mine.copy_(row.view(size, part))
    domain.submit(
        [Reduce(ranks, mine[r], r, total[r] if r == own else None, "sum", torch.float64) for r in ranks]
    )
    domain.submit([Multicast(ranks, total[r], r, total[r] if r == own else None) for r in ranks])
    row = total.flatten().cpu()
    domain.free(tables)

    # The sum over ranks of (their value - ours)**2. It is 0 only if all are equal.
    sums, squares, rest = row.split([len(same), len(same), len(row) - 2 * len(same)])
    differ = squares - 2 * values * sums + size * values**2
    for name, value, apart in zip(same, same.values(), differ.tolist()):
        if apart:
            raise ConfigMismatch(
                f"load: {name} is {value} on rank {own}, and another number on other ranks; expected the same "
                "on all ranks",
                op="load",
                rank=own,
            )
    summed: torch.Tensor = rest[: table.numel()].view(table.shape).clone()
    return summed
