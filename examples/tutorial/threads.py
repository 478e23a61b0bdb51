"""Tutorial, step 1: two ranks as threads of one process."""

import torch

import moecomm

HIDDEN, EXPERTS, TOP_K = 64, 4, 2  # experts 0 and 1 are on rank 0, experts 2 and 3 on rank 1


def main(comm):
    buf = moecomm.Buffer(
        comm, hidden=HIDDEN, num_experts=EXPERTS, top_k=TOP_K, max_tokens=4, dtype=torch.float32
    )

    # Rank 0 has three tokens, rank 1 has one. Every element of a token is its number.
    numbers = torch.tensor([[1.0, 2.0, 3.0], [4.0]][comm.rank])
    x = numbers[:, None].repeat(1, HIDDEN)
    topk_ids = torch.tensor([[[0, 2], [1, 2], [3, 0]], [[2, 3]]][comm.rank])
    topk_weights = torch.full(topk_ids.shape, 0.5)

    out = buf.dispatch(x, topk_ids, topk_weights)
    arrived = out.x[:, 0].tolist()

    # Expert e multiplies its rows by e + 1.
    first = comm.rank * buf.experts_per_rank
    factor = torch.arange(first, first + buf.experts_per_rank) + 1.0
    rows = out.x * factor.repeat_interleave(out.tokens_per_expert)[:, None]

    y = buf.combine(rows, out.handle, topk_weights=out.topk_weights)
    return out.tokens_per_expert.tolist(), arrived, y[:, 0].tolist()


for rank, (counts, arrived, y) in enumerate(moecomm.run_local(main, 2)):
    print(f"rank {rank}: rows per expert {counts}, tokens {arrived}, result {y}")
