"""Tutorial, step 3: train a Mixture-of-Experts layer. `mpirun -n 2 python layer.py`"""

import torch

import moecomm

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, TOKENS = 64, 32, 8, 2, 32

with moecomm.Communicator() as comm:
    buf = moecomm.Buffer(
        comm, hidden=HIDDEN, num_experts=EXPERTS, top_k=TOP_K, max_tokens=TOKENS, dtype=torch.float32
    )
    torch.manual_seed(0)  # the gate is replicated: its initial weights must be equal on all ranks
    layer = moecomm.nn.MoE(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, buffer=buf)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)

    torch.manual_seed(comm.rank + 1)  # each rank has its own tokens
    x, target = torch.randn(2, TOKENS, HIDDEN)
    losses = []
    for _ in range(20):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()  # communicates: the backward of combine is a dispatch, that of dispatch a combine
        optimizer.step()  # a real program first averages the gate's gradient over the ranks
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    first = layer.experts.first
    print(
        f"rank {comm.rank}: experts {first} to {first + buf.experts_per_rank - 1}, "
        f"loss {losses[0]:.2f} -> {losses[-1]:.2f}"
    )
    comm.barrier()
