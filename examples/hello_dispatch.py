"""The smallest round trip. Run it alone, by `mpirun -n 4`, or by `torchrun --nproc-per-node 4`."""

import torch

import moecomm

HIDDEN, TOP_K, TOKENS = 256, 2, 5

with moecomm.Communicator() as comm:
    experts = 4 * comm.size
    buf = moecomm.Buffer(comm, hidden=HIDDEN, num_experts=experts, top_k=TOP_K, max_tokens=TOKENS)

    # This rank's tokens, and the picks of a router.
    torch.manual_seed(comm.rank)
    x = torch.randn(TOKENS, HIDDEN).bfloat16()
    topk_weights, topk_ids = torch.rand(TOKENS, experts).softmax(-1).topk(TOP_K)

    # Send every token to the ranks that own its experts.
    out = buf.dispatch(x, topk_ids, topk_weights)
    print(f"rank {comm.rank} has {len(out.x)} rows for its experts: {out.tokens_per_expert.tolist()}")

    # The experts double their rows. They write to handle.rows, which combine reads without a copy.
    torch.mul(out.x, 2, out=out.handle.rows)

    # Send the rows back: y[t] = sum of weight * row over the experts of token t.
    y = buf.combine(out.handle.rows, out.handle, topk_weights=out.topk_weights)
    expected = x.float() * 2 * topk_weights.sum(-1, keepdim=True)
    torch.testing.assert_close(y.float(), expected, rtol=0.02, atol=0.02)
    print(f"rank {comm.rank} has its {TOKENS} tokens back")
    comm.barrier()
