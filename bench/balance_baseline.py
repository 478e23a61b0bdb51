"""Baselines of `python -m bench balance`: loads, greedy placement, and bounds from linear and integer programs."""

from __future__ import annotations

import numpy as np

LAYERS, EXPERTS, TOP_K = 58, 256, 8


def lognormal(sigma, seed):
    """Loads [58, 256] with a log-normal distribution."""
    return np.random.default_rng(seed).lognormal(0, sigma, (LAYERS, EXPERTS))


def zipf(seed, most=None):
    """Loads [58, 256] proportional to 1/rank, in random order. most: limit of the share of one expert.

    A token picks distinct experts, so no expert can have more than 1/top_k of all picks. A load beyond `most` is
    distributed over the other experts.
    """
    share = 1 / np.arange(1, EXPERTS + 1)
    share /= share.sum()
    for _ in range(64):
        if most is None or share.max() <= most * (1 + 1e-9):
            break
        over = share > most
        excess, share[over] = (share[over] - most).sum(), most
        share[share < most] *= 1 + excess / share[share < most].sum()
    generator = np.random.default_rng(seed)
    return np.stack([generator.permutation(share) for _ in range(LAYERS)])


def drift(load, seed, most=None):
    """Load after a drift step: each expert is multiplied by lognormal(0.2), up to the share `most`."""
    later = load * np.random.default_rng(seed + 1000).lognormal(0, 0.2, load.shape)
    if most is not None:
        later = np.minimum(later, most * later.sum(1, keepdims=True))
    return later


def balancedness(load, table, ranks):
    """Mean / max rank load, averaged over layers, with even split over replicas. table: experts [L, P]."""
    out = []
    for w, row in zip(load, table):
        share = (w / np.maximum(1, np.bincount(row, minlength=len(w))))[row].reshape(ranks, -1).sum(1)
        out.append(share.mean() / share.max())
    return float(np.mean(out))


# -- greedy placement ------------------------------------------------------------------------------


def pack_largest_first(weight, bins):
    """Pack items into bins of equal count, largest first, each into the lightest bin with room: [bins][items]."""
    room, total, packed = len(weight) // bins, np.zeros(bins), [[] for _ in range(bins)]
    for i in np.argsort(-weight, kind="stable"):
        b = min((b for b in range(bins) if len(packed[b]) < room), key=lambda b: total[b])
        packed[b].append(i)
        total[b] += weight[i]
    return packed


def plain_greedy(load, slots, groups, nodes, ranks):
    """Greedy placement, table [L, P]: groups to nodes, replicas for the most loaded experts, replicas to ranks."""
    table = []
    for w in load:
        per_group = len(w) // groups
        parts = nodes if groups > 1 else 1
        row = []
        for mine in pack_largest_first(w.reshape(groups, -1).sum(1), parts):
            experts = np.concatenate([np.arange(g * per_group, (g + 1) * per_group) for g in mine])
            count, owners = np.ones(len(experts), dtype=int), list(range(len(experts)))
            for _ in range(slots // parts - len(experts)):
                hottest = int(np.argmax(w[experts] / count))
                count[hottest] += 1
                owners.append(hottest)
            for held in pack_largest_first((w[experts] / count)[owners], ranks // parts):
                row += [experts[owners[i]] for i in held]
        table.append(row)
    return np.array(table)


# -- bounds ----------------------------------------------------------------------------------------


def pairing_bound(load, nodes):
    """Upper bound of the balancedness with two groups per node, whose ranks share the node's load evenly."""
    groups = np.sort(load.reshape(len(load), 2 * nodes, -1).sum(2), axis=1)
    return float((load.sum(1) / nodes / (groups[:, :nodes] + groups[:, : nodes - 1 : -1]).max(1)).mean())


def best_split(load, replicas, active=None):
    """Minimum load of the heaviest rank of one layer: a linear program splits tokens over (active) replicas."""
    from scipy.optimize import linprog

    n, first = replicas.count, replicas.first
    ranks = np.zeros((replicas.ranks, n + 1))
    ranks[replicas.rank, range(n)], ranks[:, n] = 1, -1
    experts = np.zeros((len(load), n + 1))
    for e in range(len(load)):
        experts[e, first[e] : first[e + 1]] = 1 if active is None else active[first[e] : first[e + 1]]
    return linprog(np.eye(n + 1)[n], ranks, np.zeros(replicas.ranks), experts, load).fun


def best_pairs(load, ranks, precision=2e-4):
    """Balancedness of the best counts and pairs of one layer with two slots per rank, by integer programs (HiGHS)."""
    low = load.sum() / ranks
    high = 2 * low
    while high / low > 1 + precision:
        limit = (low * high) ** 0.5
        low, high = (low, limit) if _pairs_meet(load, 2 * ranks, limit) else (limit, high)
    return load.sum() / ranks / high


def _pairs_meet(load, slots, limit):
    """Whether there are counts for which every replica of at least limit - t has a partner of at most t."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    fewest = np.maximum(1, np.ceil(load / limit - 1e-12)).astype(int)
    if fewest.sum() > slots:
        return False
    choices = [
        (e, c)
        for e in range(len(load))
        for c in range(fewest[e], fewest[e] + min(slots - fewest.sum(), 4) + 1)
    ]
    expert, count = np.array(choices).T
    size = load[expert] / count
    steps = np.unique(limit - size[size > limit / 2])
    partners = [count * ((size <= t + 1e-12).astype(float) - (size >= limit - t - 1e-12)) for t in steps]
    once = csr_matrix((np.ones(len(choices)), (expert, np.arange(len(choices)))))
    rules = [
        LinearConstraint(once, 1, 1),
        LinearConstraint(csr_matrix(count[None].astype(float)), slots, slots),
    ]
    if partners:
        rules.append(LinearConstraint(csr_matrix(np.array(partners)), 0, np.inf))
    found = milp(
        np.zeros(len(choices)),
        constraints=rules,
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        options={"time_limit": 20},
    )
    return found.status == 0


def fewest_moves(old, new, ranks):
    """Minimum number of slots that change per layer, over all assignments of the new sets of experts to ranks."""
    from scipy.optimize import linear_sum_assignment

    moves = []
    for before, after in zip(old, new):
        sets = [set(r) for r in before.reshape(ranks, -1).tolist()]
        kept = np.array(
            [[len(sets[i].intersection(r)) for r in after.reshape(ranks, -1).tolist()] for i in range(ranks)]
        )
        moves.append(len(before) - kept[linear_sum_assignment(-kept)].sum())
    return np.array(moves)
