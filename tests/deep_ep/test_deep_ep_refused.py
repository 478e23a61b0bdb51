"""Arguments of deep_ep that moecomm refuses, each with its reason."""

import pytest
import torch
from deep_ep_oracle import with_buffer

import moecomm
from moecomm.integrations import deep_ep

REFUSED = {
    "group and comm": lambda: deep_ep.Buffer(None),
    "num_nvl_bytes is -1": lambda: with_buffer(lambda b: 0, num_nvl_bytes=-1),
    "num_sms is 3": lambda: deep_ep.Config(num_sms=3),
    "num_max_nvl_chunked_send_tokens is 9": lambda: deep_ep.Config(20, 9, 9),
    "even int": lambda: deep_ep.Buffer.set_num_sms(3),
    "explicitly_destroy=False": lambda: with_buffer(lambda b: b.destroy()),
    "scratch memory": lambda: with_buffer(lambda b: b.get_local_buffer_tensor(torch.uint8)),
    "low_latency_mode=False": lambda: with_buffer(
        lambda b: b.low_latency_dispatch(torch.zeros(1, 64).bfloat16(), torch.zeros(1, 1).long(), 4, 4)
    ),
    "enable_shrink=False": lambda: with_buffer(
        lambda b: b.low_latency_clean_mask_buffer(), low_latency_mode=True
    ),
    "there was no low_latency_dispatch": lambda: with_buffer(
        lambda b: b.low_latency_update_mask_buffer(0, True), enable_shrink=True
    ),
    "use_nvfp4 is given": lambda: with_buffer(
        lambda b: b.low_latency_dispatch(
            torch.zeros(1, 64).bfloat16(), torch.zeros(1, 1).long(), 4, 4, use_nvfp4=True
        ),
        low_latency_mode=True,
    ),
    "dispatch_wait_recv_cost_stats is given": lambda: with_buffer(
        lambda b: b.low_latency_dispatch(
            torch.zeros(1, 64).bfloat16(), torch.zeros(1, 1).long(), 4, 4, None, torch.zeros(1, 1).long()
        ),
        low_latency_mode=True,
    ),
    "async_finish and return_recv_hook": lambda: with_buffer(
        lambda b: b.low_latency_dispatch(
            torch.zeros(1, 64).bfloat16(),
            torch.zeros(1, 1).long(),
            4,
            4,
            async_finish=True,
            return_recv_hook=True,
        ),
        low_latency_mode=True,
    ),
    "expected an int of at least 5": lambda: with_buffer(
        lambda b: b.low_latency_dispatch(torch.zeros(5, 64).bfloat16(), torch.zeros(5, 1).long(), 4, 4),
        low_latency_mode=True,
    ),
    "num_tokens_per_rank is None": lambda: with_buffer(lambda b: b.dispatch(torch.zeros(1, 8))),
    "does not match topk_idx": lambda: with_buffer(
        lambda b: b.dispatch(
            torch.zeros(1, 8),
            None,
            torch.ones(1).int(),
            None,
            torch.zeros(1, 1).bool(),
            torch.ones(1).int(),
            torch.zeros(1, 1).long(),
            torch.ones(1, 1),
        )
    ),
    "a row of x has 12 bytes": lambda: with_buffer(lambda b: b.dispatch(torch.zeros(1, 3))),
    "handle is a int": lambda: with_buffer(lambda b: b.combine(torch.zeros(1, 8), 3)),
    "num_experts is 0": lambda: with_buffer(lambda b: b.get_dispatch_layout(torch.zeros(1, 1).long(), 0)),
    "ids from 0 to 7": lambda: with_buffer(lambda b: b.get_dispatch_layout(torch.tensor([[0, 7]]), 4)),
    "topk_idx is torch.float32": lambda: with_buffer(lambda b: b.get_dispatch_layout(torch.zeros(1, 1), 4)),
    "allocate_on_comm_stream is set": lambda: with_buffer(
        lambda b: b.get_dispatch_layout(torch.zeros(1, 1).long(), 4, allocate_on_comm_stream=True)
    ),
    "previous_event is a int": lambda: with_buffer(
        lambda b: b.get_dispatch_layout(torch.zeros(1, 1).long(), 4, previous_event=3)
    ),
    "no option retries": lambda: deep_ep.configure(retries=3),
    "expected a plain torch.Tensor": lambda: with_buffer(
        lambda b: b.get_dispatch_layout(torch.zeros(1, 1).long().as_subclass(Own), 4)
    ),
}


class Own(torch.Tensor):
    """A subclass of Tensor, which may have no memory."""


@pytest.mark.parametrize("said", REFUSED)
def test_refused(said):
    """A typed error names the argument, its value, and the expectation."""
    with pytest.raises(moecomm.InvalidArgument, match=said):
        REFUSED[said]()


def test_an_opaque_handle_says_so():
    """deep_ep's tuples of kernel tensors are not emulated."""

    def look(buffer):
        out = buffer.dispatch(
            torch.zeros(1, 8), None, torch.ones(1).int(), None, torch.ones(1, 1).bool(), torch.ones(1).int()
        )
        with pytest.raises(deep_ep.Unsupported, match="opaque"):
            _a, _b = out[4]
        handle = buffer.low_latency_dispatch(torch.zeros(1, 64).bfloat16(), torch.zeros(1, 1).long(), 4, 4)[2]
        with pytest.raises(NotImplementedError, match="src_info"):
            handle[0]

    with_buffer(look, low_latency_mode=True)
