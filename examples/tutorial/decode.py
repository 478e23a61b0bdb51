"""Tutorial, step 4: a decode step in two phases, on two nodes of two ranks."""

import torch

import moecomm

HIDDEN, EXPERTS, TOP_K, TOKENS = 256, 8, 2, 4


def main(comm):
    buf = moecomm.Buffer(
        comm, hidden=HIDDEN, num_experts=EXPERTS, top_k=TOP_K, max_tokens=TOKENS, decode=True
    )
    x = torch.randn(TOKENS, HIDDEN).bfloat16()
    topk_weights, topk_ids = torch.rand(TOKENS, EXPERTS).softmax(-1).topk(TOP_K)

    recv, hook = buf.decode_dispatch(x, topk_ids, quant=None)  # sends, and returns immediately
    # Compute something else here. moecomm runs no code until the hook is called.
    hook()  # waits for the rows of all ranks

    for expert, count in enumerate(recv.counts.tolist()):  # each expert doubles its rows
        torch.mul(recv.x[expert, :count], 2, out=recv.handle.rows[expert, :count])

    y, hook = buf.decode_combine(recv.handle.rows, topk_ids, topk_weights, recv.handle)
    hook()

    expected = 2 * x.float() * topk_weights.sum(-1, keepdim=True)
    torch.testing.assert_close(y.float(), expected, rtol=0.02, atol=0.02)
    return int(recv.counts.sum())


received = moecomm.run_local(main, 4, ranks_per_node=2)
print(f"{sum(received)} rows arrived for {4 * TOKENS * TOP_K} picks; all {4 * TOKENS} tokens are back")
