"""Invalid arguments of placements, rebalance, advise and LoadMonitor: a typed error names the argument."""

import warnings

import numpy as np
import pytest
import torch
from odd_values import EVERY, Unprintable, label

import moecomm
from moecomm.balance import LoadMonitor, Placement, rebalance, rebalance_experts

TABLE = torch.tensor([[0, 1, 2, 0], [1, 2, 0, 1]])
PLACED = Placement(TABLE, 3, 2)


def advise(monitor=None, **changes):
    if monitor is None:
        monitor = LoadMonitor(2, 3)
        monitor.record(0, [1, 2, 3])
    arguments = (
        dict(placement=PLACED, seconds_per_row=1e-6, bytes_per_expert=1e6, bytes_per_second=1e9, batches=10)
        | changes
    )
    return monitor.advise(arguments.pop("placement"), **arguments)


def record(**changes):
    LoadMonitor(2, 3).record(**(dict(layer=0, counts=[1, 2, 3]) | changes))


CALLS = {  # function of one changed argument, and the values that are valid
    "rebalance": (
        lambda **c: rebalance(**(dict(load=np.ones((2, 3)), num_replicas=4, num_ranks=2) | c)),
        (
            "load",
            "num_replicas",
            "num_groups",
            "num_nodes",
            "num_ranks",
            "previous",
            "max_moves",
            "connected",
        ),
    ),
    "rebalance_experts": (
        lambda **c: rebalance_experts(
            **(dict(weight=np.ones((2, 3)), num_replicas=4, num_groups=1, num_nodes=1, num_gpus=2) | c)
        ),
        ("weight", "num_replicas", "num_groups", "num_nodes", "num_gpus"),
    ),
    "Placement": (
        lambda **c: Placement(**(dict(physical_to_logical=TABLE, num_experts=3, num_ranks=2) | c)),
        ("physical_to_logical", "num_experts", "num_ranks", "num_nodes", "version", "previous", "partial"),
    ),
    "rank_load": (PLACED.rank_load, ("load",)),
    "balancedness": (PLACED.balancedness, ("load",)),
    "surviving": (lambda **c: PLACED.surviving(**(dict(alive=[0]) | c)), ("alive", "num_nodes")),
    "LoadMonitor": (
        lambda **c: LoadMonitor(**(dict(num_layers=2, num_experts=3) | c)),
        ("num_layers", "num_experts", "window", "half_life"),
    ),
    "record": (record, ("layer", "counts", "everywhere")),
    "load": (lambda **c: LoadMonitor(2, 3).load(**c), ("comm", "weighted")),
    "advise": (
        advise,
        (
            "placement",
            "seconds_per_row",
            "bytes_per_expert",
            "bytes_per_second",
            "batches",
            "comm",
            "max_moves",
            "num_groups",
            "connected",
            "nonsense",
        ),
    ),
}
NAMES = {
    "weight": "load",
    "num_gpus": "num_ranks",
    "nonsense": "options",
    ("surviving", "num_nodes"): "num_nodes",
}


@pytest.mark.parametrize(
    "function,argument", [(f, a) for f, (_, arguments) in CALLS.items() for a in arguments]
)
def test_odd_values(function, argument):
    """Each value is valid or refused by name; at least half of them are refused."""
    refused, call = 0, CALLS[function][0]
    for value in EVERY:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call(**{argument: value})
        except moecomm.InvalidArgument as error:
            refused += 1
            assert NAMES.get(argument, argument) in str(error) and " is " in str(error), (
                f"{label(value)}: {error}"
            )
            assert len(str(error)) < 500, f"{label(value)}: {error}"
        except Exception as error:
            pytest.fail(f"{function}({argument}={label(value)}) raised {type(error).__name__}: {error}")
    assert refused > len(EVERY) / 2, refused


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16,
        torch.float16,
        torch.float32,
        torch.float64,
        torch.int32,
        torch.int64,
        torch.uint8,
        torch.float8_e4m3fn,
    ],
)
def test_loads_of_any_dtype(dtype):
    """Also dtypes that NumPy lacks, and tensors that require a gradient."""
    load = torch.tensor([[1, 2, 4, 8]]).to(dtype)
    load = load.requires_grad_() if dtype.is_floating_point and dtype.itemsize > 1 else load
    want = rebalance(np.array([[1.0, 2, 4, 8]]), num_replicas=6, num_ranks=2)
    assert torch.equal(
        rebalance(load, num_replicas=np.int64(6), num_ranks=torch.tensor(2)).physical_to_logical,
        want.physical_to_logical,
    )
    assert PLACED.rank_load(np.ones((2, 3), dtype=np.float16)).shape == (2, 2)


@pytest.mark.parametrize("exponent", [-1074, -1063, -997, -664, 515, 664, 997, 1019])
def test_loads_of_any_magnitude(exponent):
    """The balance does not depend on the unit of the loads, for any number of slots, with or without previous."""
    load, unit = np.random.default_rng(0).integers(1, 9, (3, 12)).astype(np.float64), 2.0**exponent
    for slots in (1, 2, 3):
        ranks = 16 // slots + (slots == 3)
        want = rebalance(load, num_replicas=slots * ranks, num_ranks=ranks)
        got = rebalance(load * unit, num_replicas=slots * ranks, num_ranks=ranks)
        assert torch.equal(got.physical_to_logical, want.physical_to_logical)
        assert got.balancedness(load * unit) == pytest.approx(want.balancedness(load), rel=1e-9)
        rebalance(load[::-1] * unit, num_replicas=slots * ranks, num_ranks=ranks, previous=got, max_moves=1)


def test_a_half_life_without_end():
    """With a half-life so long that nothing decays, the advice is finite."""
    monitor = LoadMonitor(2, 3, half_life=1e300)
    for _ in range(5):
        monitor.record(0, [9, 1, 1])
        monitor.record(1, [1, 1, 9])
    advice = advise(monitor)
    assert np.isfinite([advice.gain, advice.cost, advice.before, advice.after]).all() and advice.gain > 0
    LoadMonitor(2, 3, half_life=5e-324).record(0, [1, 2, 3])


def test_what_is_wrong_on_one_rank_is_raised_on_all():
    """No rank waits for a rank that has refused."""

    def main(comm):
        monitor = LoadMonitor(2, 3)
        monitor.record(0, [1, 2, 3])
        with pytest.raises(
            moecomm.InvalidArgument, match=r"advise: bytes_per_second is a Unprintable.*rank 1"
        ):
            advise(monitor, comm=comm, bytes_per_second=Unprintable() if comm.rank == 1 else 1e9)
        return advise(monitor, comm=comm).before  # the communicator still works

    before = moecomm.run_local(main, 2, timeout=60)
    assert before[0] == before[1]
