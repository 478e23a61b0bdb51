"""MoE layers beside DDP, FSDP2 and distributed checkpoints, over real processes: run by tests/nn/test_parallelism.py.

python parallel_worker.py FOLDER SCENARIO RANKS [SCENARIO RANKS ...]    one after the other, each in forked ranks
"""

import contextlib
import os
import sys
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import moecomm
from moecomm.nn import MoE, clip_grad_norm_, exclude_experts

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, TOKENS = 16, 8, 8, 2, 24


def model_of(comm, **options):
    """A layer between two linear ones, in float64; equal on all ranks but for their experts."""
    shape = dict(hidden=HIDDEN, num_experts=EXPERTS, top_k=TOP_K, max_tokens=TOKENS, dtype=torch.float64)
    layer = MoE(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, 1, moecomm.Buffer(comm, **shape), **options)
    model = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), layer, nn.Linear(HIDDEN, HIDDEN))
    for part in (model[0], model[2], layer.gate):
        part.double()
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        mine = name.startswith("1.experts.")  # of all experts, from which every rank takes its own
        shape = (EXPERTS, *p.shape[1:]) if mine else p.shape
        value = 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
        if mine:
            layer.experts.load_state_dict({name.removeprefix("1.experts."): value}, strict=False)
        else:
            p.data.copy_(value)
    return model


def batch_of(step):
    """(x, wanted) of all ranks together."""
    g = torch.Generator().manual_seed(100 + step)
    return (torch.randn(TOKENS, HIDDEN, generator=g, dtype=torch.float64) for _ in range(2))


def parts(comm):
    """The rows of a batch that this rank has: unevenly many."""
    bounds = [TOKENS * r * r // comm.size**2 for r in range(comm.size + 1)]
    return slice(bounds[comm.rank], bounds[comm.rank + 1])


def train(model, optimizer, comm, steps, averaged, max_norm=0.5):
    """Steps with clipped gradients; the norms before. averaged: gradients of the ranks are averaged, not summed."""
    norms = []
    for step in steps:
        x, wanted = (t[parts(comm)] for t in batch_of(step))
        loss = (model(x) - wanted).square().sum() / TOKENS
        optimizer.zero_grad()
        (loss * (comm.size if averaged else 1)).backward()
        moe = model.module if isinstance(model, DistributedDataParallel) else model
        norms.append(float(clip_grad_norm_(moe, max_norm)))
        optimizer.step()
    return norms


def alone(steps=3):
    """(parameters of all, norms) as one process computes them."""

    def run(comm):
        model = model_of(comm)
        norms = train(model, torch.optim.AdamW(model.parameters(), lr=0.01), comm, range(steps), False)
        return {name: p.detach() for name, p in model.named_parameters()}, norms

    return moecomm.run_local(run, 1)[0]


def assert_learned(model, norms):
    """The model over ranks is what one process makes of it."""
    want, expected = alone()
    assert all(n > 0.5 for n in expected), "no gradient was clipped"
    torch.testing.assert_close(torch.tensor(norms), torch.tensor(expected), rtol=1e-6, atol=0)
    for name, p in model.named_parameters():
        got = p.full_tensor() if isinstance(p, DTensor) else p.detach()
        if got.shape != want[name].shape:
            first = model[1].experts.first
            want[name] = want[name][first : first + len(got)]
        torch.testing.assert_close(got, want[name], rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@contextlib.contextmanager
def refused(*words, kind=moecomm.InvalidArgument):
    """The block raises an error that says these words."""
    try:
        yield
    except kind as error:
        assert all(word in str(error) for word in words), error
    else:
        raise AssertionError(f"not refused: {words}")


def plain_is_refused(_):
    """Experts that are plain parameters: DDP, both FSDPs and checkpoints refuse them, and they stay as they were."""
    comm = moecomm.Communicator()
    model = model_of(comm)
    before = [p.detach().clone() for p in model.parameters()]
    with refused("DistributedDataParallel", "1.experts.gate_up", "exclude_experts"):
        DistributedDataParallel(model)
    outer = nn.Sequential(model_of(comm))
    exclude_experts(outer[0])  # by names that DDP does not know them by
    with refused("DistributedDataParallel", "0.1.experts.gate_up"):
        DistributedDataParallel(outer)
    with refused("FullyShardedDataParallel", "exclude_experts"):
        FullyShardedDataParallel(model_of(comm), use_orig_params=True, device_id=torch.device("cpu"))
    other = model_of(comm)
    FullyShardedDataParallel(other, ignored_states=exclude_experts(other), device_id=torch.device("cpu"))
    assert torch.equal(other[1].experts.down, model[1].experts.down)
    with refused("torch.distributed.checkpoint", "mesh"):
        states.get_model_state_dict(model)
    with refused("torch.distributed.checkpoint", "mesh"):
        states.get_optimizer_state_dict(model, torch.optim.AdamW(model.parameters()))
    for p, was in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, was)
    with refused("exclude_experts", "mesh", "gate_up"):
        fully_shard(model[1].experts)
    assert torch.equal(model[1].experts.gate_up, model_of(comm)[1].experts.gate_up)


def mesh_is_refused(comm):
    """DTensors: DDP refuses them until they are excluded, torch itself what would shard them over the same ranks twice,
    and a norm of DTensors and plain tensors.
    """
    model = model_of(comm)
    experts = model[1].experts
    assert isinstance(experts.down, DTensor) and experts.down.placements == (Shard(0),)
    assert experts.down.shape[0] == EXPERTS and len(experts.down.to_local()) == EXPERTS // comm.size
    before = experts.down.to_local().clone()
    with refused("DistributedDataParallel", "exclude_experts"):
        DistributedDataParallel(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with refused("DTensor", kind=RuntimeError):
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with refused(kind=(RuntimeError, TypeError)):
        fully_shard(model[1].experts, mesh=comm.mesh)
    assert torch.equal(experts.down.to_local(), before)
    other = init_device_mesh("cpu", (1, comm.size), mesh_dim_names=("one", "all"))
    for bad, words in ((other, "2 dimensions"), (other["one"], "size"), ("ep", "'ep'")):
        with refused("mesh", words):
            model_of(comm, mesh=bad)
    plain = model_of(comm, mesh=None)[1].experts
    assert not isinstance(plain.down, DTensor)


def ddp(comm):
    """DDP averages everything but the experts."""
    model = model_of(comm)
    exclude_experts(model)
    wrapped = DistributedDataParallel(model)
    norms = train(wrapped, torch.optim.AdamW(model.parameters(), lr=0.01), comm, range(3), True)
    assert_learned(model, norms)


def ddp_plain(_):
    """The same with plain experts: their norm goes over the Communicator."""
    comm = moecomm.Communicator()
    model = model_of(comm)
    exclude_experts(model)
    wrapped = DistributedDataParallel(model)
    norms = train(wrapped, torch.optim.AdamW(model.parameters(), lr=0.01), comm, range(3), True)
    assert_learned(model, norms)


def fsdp(comm):
    """fully_shard shards everything but the experts over the same ranks; torch's own clip_grad_norm_ serves then."""
    model = model_of(comm)
    fully_shard(model, mesh=comm.mesh, ignored_params=exclude_experts(model))
    norms = train(model, torch.optim.AdamW(model.parameters(), lr=0.01), comm, range(3), True)
    assert_learned(model, norms)
    again = nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor()
    torch.testing.assert_close(again, torch.tensor(0.5, dtype=torch.float64), rtol=1e-5, atol=0)


def fsdp_of_experts(comm):
    """Two groups of experts: fully_shard shards each rank's experts over those that have the same ones."""
    comm.close()
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicas", "experts"))
    everyone = mesh._flatten("everyone")
    with moecomm.Communicator(mesh["experts"]) as group:
        model = model_of(group)
        ignored = exclude_experts(model)
        fully_shard(model[1].experts, mesh=mesh["replicas"])
        fully_shard(model, mesh=everyone, ignored_params=ignored)
        assert model[1].experts.down.to_local().shape[0] == EXPERTS // dist.get_world_size()

        class All:
            rank, size = dist.get_rank(), dist.get_world_size()

        norms = train(model, torch.optim.AdamW(model.parameters(), lr=0.01), All, range(3), True)
        assert_learned(model, norms)


def whole_state(model, optimizer):
    """Everything, on every rank."""
    options = states.StateDictOptions(full_state_dict=True, cpu_offload=False)
    model_state, optimizer_state = states.get_state_dict(model, optimizer, options=options)
    return {"model": model_state, "optimizer": optimizer_state}


def flat(tree, prefix=""):
    """The tensors of nested dicts by their paths."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}/")
        elif isinstance(value, torch.Tensor):
            yield prefix + key, value


def assert_equal_states(got, want):
    got, want = dict(flat(got)), dict(flat(want))
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def checkpointed(comm, folder, load, save, sharded):
    """Loads what `load` says, trains a step, saves under `save`; the state of all ranks must be one checkpoint."""
    model = model_of(comm)
    averaged = True
    if sharded:
        fully_shard(model, mesh=comm.mesh, ignored_params=exclude_experts(model))
    else:
        exclude_experts(model)
        DistributedDataParallel(model)
        averaged = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if load is None:
        train(model, optimizer, comm, range(1), averaged)
    else:
        state = dict(zip(("model", "optimizer"), states.get_state_dict(model, optimizer), strict=True))
        dcp.load(state, checkpoint_id=f"{folder}/{load}")
        states.set_state_dict(
            model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        assert_equal_states(whole_state(model, optimizer), torch.load(f"{folder}/{load}.pt"))
    model_state, optimizer_state = states.get_state_dict(model, optimizer)
    name = "1.experts.down"
    for held in (model_state[name], optimizer_state["state"][name]["exp_avg"]):
        assert isinstance(held, DTensor) and held.shape[0] == EXPERTS
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=f"{folder}/{save}")
    whole = whole_state(model, optimizer)
    moments = whole["optimizer"]["state"][name]["exp_avg"]
    assert len({float(m.abs().sum()) for m in moments}) == EXPERTS, "the state of two experts is the same"
    if comm.rank == 0:
        torch.save(whole, f"{folder}/{save}.pt")
    # A whole checkpoint goes back into any number of ranks.
    twin = model_of(comm)
    twin.load_state_dict(whole["model"])
    assert torch.equal(twin[1].experts.down.to_local(), model[1].experts.down.to_local())


def save_by_four(comm, folder):
    checkpointed(comm, folder, None, "four", True)


def load_by_two(comm, folder):
    checkpointed(comm, folder, "four", "two", True)


def load_by_eight(comm, folder):
    checkpointed(comm, folder, "two", "eight", False)


def raw_optimizer(comm, folder):
    """optimizer.state_dict(), saved as it is, keeps every rank's own experts."""
    model = model_of(comm)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, comm, range(1), False)
    want = {k: v.to_local().clone() for k, v in optimizer.state[model[1].experts.down].items() if v.dim()}
    dcp.save({"optimizer": optimizer.state_dict()}, checkpoint_id=f"{folder}/raw")
    for value in optimizer.state[model[1].experts.down].values():
        value.zero_()
    state = {"optimizer": optimizer.state_dict()}
    dcp.load(state, checkpoint_id=f"{folder}/raw")
    optimizer.load_state_dict(state["optimizer"])
    for key, value in want.items():
        assert value.any() and torch.equal(optimizer.state[model[1].experts.down][key].to_local(), value)


def forms(comm):
    """Checkpoints with a key per expert, DTensors, and whole tensors load into either kind of layer; wrong ones are
    named.
    """
    model, plain = model_of(comm), model_of(comm, mesh=None)
    experts = model[1].experts
    whole = {
        name: torch.randn(getattr(experts, name).shape, dtype=torch.float64) for name in ("gate_up", "down")
    }
    for tensor in whole.values():
        dist.broadcast(tensor, 0)
    merged = {f"{e}.down_proj.weight": whole["down"][e] for e in range(EXPERTS)}
    for e in range(EXPERTS):
        merged[f"{e}.gate_proj.weight"], merged[f"{e}.up_proj.weight"] = whole["gate_up"][e].chunk(2)
    mine = slice(EXPERTS // comm.size * comm.rank, EXPERTS // comm.size * (comm.rank + 1))
    experts.load_state_dict(whole)
    fused = {name: value.clone() for name, value in experts.state_dict().items()}
    for form in (merged, fused, whole):
        for options in ({}, dict(mesh=None)):
            if form is fused and options:
                continue  # refused below
            fresh = model_of(comm, **options)[1].experts
            fresh.load_state_dict(form)
            for name, value in whole.items():
                got = moecomm.nn.experts.local_part(getattr(fresh, name))
                assert torch.equal(got, value[mine]), (form.keys(), options)
    plain[1].experts.load_state_dict(whole)
    own = plain[1].experts.state_dict()
    assert len(own) == 3 * EXPERTS // comm.size and all(torch.equal(own[k], merged[k]) for k in own)
    with refused("size mismatch for down", kind=RuntimeError):
        model[1].experts.load_state_dict(whole | {"down": whole["down"][:1]})
    with refused("Missing key", "gate_up", kind=RuntimeError):
        model[1].experts.load_state_dict({})
    with refused("DTensor", "plain tensor", kind=RuntimeError):
        plain[1].experts.load_state_dict(fused)
    with torch.device("meta"):
        empty = moecomm.nn.Experts(
            HIDDEN, INTERMEDIATE, 2, 2 * comm.rank, num_experts=EXPERTS, mesh=comm.mesh
        )
    with refused("meta", kind=RuntimeError):
        empty.load_state_dict(merged)


def compiled(comm):
    """A compiled layer with DTensors equals the eager one, divided gradients included."""
    layer = model_of(comm, capacity=EXPERTS * TOKENS)[1]
    exclude_experts(layer)
    x = torch.randn(4, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(comm.rank))

    def gradients(f):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        f(leaf).square().sum().backward()
        return [leaf.grad, *[moecomm.nn.experts.local_part(p.grad) for p in layer.parameters()]]

    want = gradients(layer)
    got = gradients(torch.compile(layer, fullgraph=True, dynamic=False, backend="aot_eager"))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def one_rank(scenario, rank, size, folder):
    """A forked rank: joins the others and runs the scenario."""
    where = f"file://{folder}/store-{scenario}-{size}"
    dist.init_process_group(
        "gloo", init_method=where, rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    function = globals()[scenario]
    arguments = (folder,) if function.__code__.co_argcount == 2 else ()
    function(moecomm.Communicator(init_device_mesh("cpu", (size,), mesh_dim_names=("ep",))), *arguments)
    dist.barrier()


def over_ranks(scenario, size, folder):
    """Whether all ranks went through it."""
    ranks = []
    for rank in range(size):
        ranks.append(os.fork())
        if ranks[-1] == 0:
            status = 1
            try:
                one_rank(scenario, rank, size, folder)
                status = 0
            except BaseException:
                print(f"{scenario}, rank {rank} of {size}:\n{traceback.format_exc()}", file=sys.stderr)
            sys.stderr.flush()
            # Caches of DTensor keep torch's groups, and gloo's threads with them: one that still held a tensor would
            # abort the interpreter's end.
            os._exit(status)
    ended = [os.waitpid(pid, 0)[1] for pid in ranks]  # of all, also where one has failed
    return not any(ended)


def main(folder, *wanted):
    """Every scenario, in order."""
    torch.set_num_threads(1)
    done = [over_ranks(name, int(size), folder) for name, size in zip(wanted[::2], wanted[1::2], strict=True)]
    if not all(done):
        raise SystemExit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
