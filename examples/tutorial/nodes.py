"""Tutorial, step 2: two nodes of two ranks under mpirun. `mpirun -n 4 python nodes.py`"""

import torch

import moecomm

HIDDEN, EXPERTS, TOP_K, TOKENS = 64, 8, 4, 16

with moecomm.Communicator(ranks_per_node=2) as comm:  # without ranks_per_node: one node per host
    buf = moecomm.Buffer(comm, hidden=HIDDEN, num_experts=EXPERTS, top_k=TOP_K, max_tokens=TOKENS)

    # Every token picks two experts on each node.
    x = torch.full((TOKENS, HIDDEN), float(comm.rank), dtype=torch.bfloat16)
    topk_ids = torch.tensor([[0, 3, 4, 7]]).repeat(TOKENS, 1)
    out = buf.dispatch(x, topk_ids)

    # A token crosses to the other node once, although two of its experts are there.
    crossed = buf.stats()["rail"]["physical_rows"]

    # The experts change nothing, and all weights are 1: y is the sum of four equal rows.
    y = buf.combine(out.x, out.handle)
    assert (y == 4 * x).all()
    print(f"rank {comm.rank}, node {comm.node}: {TOKENS} tokens, {crossed} rows sent to the other node")
    comm.barrier()
