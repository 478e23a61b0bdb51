"""One training step of a MoE layer. Run it alone, by `mpirun -n 4`, or by `torchrun --nproc-per-node 4`."""

import torch

import moecomm

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, TOKENS = 256, 128, 16, 2, 32

with moecomm.Communicator() as comm:
    buf = moecomm.Buffer(
        comm, hidden=HIDDEN, num_experts=EXPERTS, top_k=TOP_K, max_tokens=TOKENS, dtype=torch.float32
    )

    # DeepSeek-V3's gate with two of four groups of experts per token. Each rank has EXPERTS / size experts and a
    # shared expert.
    torch.manual_seed(0)
    gate = moecomm.gate.Gate(HIDDEN, EXPERTS, TOP_K, num_groups=4, top_groups=2, scale=2.5)
    layer = moecomm.nn.MoE(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, shared_experts=1, buffer=buf, gate=gate)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.003)

    # This rank's tokens. Ranks may have different numbers of tokens.
    torch.manual_seed(comm.rank)
    x, target = torch.randn(2, TOKENS, HIDDEN)
    for step in range(3):
        y, routing = layer(x, with_routing=True)
        loss = (y - target).square().mean()
        optimizer.zero_grad()
        (loss / comm.size).backward()  # the backward of combine is a dispatch, that of dispatch a combine
        optimizer.step()  # a real program first sums the gradients of replicated parameters over the ranks
        gate.update_bias(moecomm.gate.count_picks(routing.topk_ids, EXPERTS), 0.001)
        print(f"rank {comm.rank}, step {step}: loss {float(loss.detach()):.4f}, {layer.experts}")
    comm.barrier()
