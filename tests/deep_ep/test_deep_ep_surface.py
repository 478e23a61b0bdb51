"""deep_ep's names, arguments and defaults, in order; the three ways to import them; and refused arguments."""

import inspect

import pytest
import torch
from deep_ep_oracle import with_buffer

import moecomm
from moecomm.integrations import deep_ep

NONE, REQUIRED = None, inspect.Parameter.empty
EVENTS = [("previous_event", NONE), ("async_finish", False), ("allocate_on_comm_stream", False)]
V2_EVENTS = [
    ("previous_event", NONE),
    ("previous_event_before_epilogue", NONE),
    ("async_with_compute_stream", False),
    ("allocate_on_comm_stream", False),
]
# All verbs: (argument, default) in deep_ep's order. Arguments of its forks are keyword-only and come last.
VERBS = {
    "Config": [
        ("num_sms", 20),
        ("num_max_nvl_chunked_send_tokens", 6),
        ("num_max_nvl_chunked_recv_tokens", 256),
        ("num_max_rdma_chunked_send_tokens", 6),
        ("num_max_rdma_chunked_recv_tokens", 256),
    ],
    "Config.get_nvl_buffer_size_hint": [("hidden_bytes", REQUIRED), ("num_ranks", REQUIRED)],
    "Config.get_rdma_buffer_size_hint": [("hidden_bytes", REQUIRED), ("num_ranks", REQUIRED)],
    "EventOverlap": [("event", NONE), ("extra_tensors", NONE)],
    "EventOverlap.current_stream_wait": [("release_handle", False)],
    "EventHandle": [],
    "EventHandle.current_stream_wait": [],
    "Buffer": [
        ("group", REQUIRED),
        ("num_nvl_bytes", 0),
        ("num_rdma_bytes", 0),
        ("low_latency_mode", False),
        ("num_qps_per_rank", 24),
        ("allow_nvlink_for_low_latency_mode", True),
        ("allow_mnnvl", False),
        ("use_fabric", False),
        ("explicitly_destroy", False),
        ("enable_shrink", False),
        ("comm", NONE),
    ],
    "Buffer.set_num_sms": [("new_num_sms", REQUIRED)],
    "Buffer.capture": [],
    "Buffer.get_dispatch_config": [("num_ranks", REQUIRED)],
    "Buffer.get_combine_config": [("num_ranks", REQUIRED)],
    "Buffer.is_sm90_compiled": [],
    "Buffer.get_low_latency_rdma_size_hint": [
        (name, REQUIRED)
        for name in ("num_max_dispatch_tokens_per_rank", "hidden", "num_ranks", "num_experts")
    ],
    "Buffer.get_dispatch_layout": [("topk_idx", REQUIRED), ("num_experts", REQUIRED), *EVENTS],
    "Buffer.dispatch": [
        ("x", REQUIRED),
        ("handle", NONE),
        ("num_tokens_per_rank", NONE),
        ("num_tokens_per_rdma_rank", NONE),
        ("is_token_in_rank", NONE),
        ("num_tokens_per_expert", NONE),
        ("topk_idx", NONE),
        ("topk_weights", NONE),
        ("expert_alignment", 1),
        ("num_worst_tokens", 0),
        ("config", NONE),
        *EVENTS,
    ],
    "Buffer.combine": [
        ("x", REQUIRED),
        ("handle", REQUIRED),
        ("topk_weights", NONE),
        ("bias", NONE),
        ("config", NONE),
        *EVENTS,
    ],
    "Buffer.low_latency_dispatch": [
        ("x", REQUIRED),
        ("topk_idx", REQUIRED),
        ("num_max_dispatch_tokens_per_rank", REQUIRED),
        ("num_experts", REQUIRED),
        ("cumulative_local_expert_recv_stats", NONE),
        ("dispatch_wait_recv_cost_stats", NONE),
        ("use_fp8", True),
        ("round_scale", False),
        ("use_ue8m0", False),
        ("async_finish", False),
        ("return_recv_hook", False),
    ],
    "Buffer.low_latency_combine": [
        ("x", REQUIRED),
        ("topk_idx", REQUIRED),
        ("topk_weights", REQUIRED),
        ("handle", REQUIRED),
        ("use_logfmt", False),
        ("zero_copy", False),
        ("async_finish", False),
        ("return_recv_hook", False),
        ("out", NONE),
        ("combine_wait_recv_cost_stats", NONE),
    ],
    "Buffer.clean_low_latency_buffer": [
        ("num_max_dispatch_tokens_per_rank", REQUIRED),
        ("hidden", REQUIRED),
        ("num_experts", REQUIRED),
    ],
    "Buffer.get_next_low_latency_combine_buffer": [("handle", REQUIRED)],
    "Buffer.low_latency_update_mask_buffer": [("rank_to_mask", REQUIRED), ("mask", False)],
    "Buffer.low_latency_query_mask_buffer": [("mask_status", REQUIRED)],
    "Buffer.low_latency_clean_mask_buffer": [],
    "Buffer.get_local_buffer_tensor": [
        ("dtype", REQUIRED),
        ("size", NONE),
        ("offset", 0),
        ("use_rdma_buffer", False),
    ],
    "Buffer.get_comm_stream": [],
    "Buffer.destroy": [],
    "ElasticBuffer": [
        ("group", REQUIRED),
        ("num_bytes", NONE),
        ("num_cpu_bytes", 0),
        ("num_max_tokens_per_rank", 0),
        ("hidden", 0),
        ("num_topk", 0),
        ("use_fp8_dispatch", False),
        ("deterministic", False),
        ("allow_hybrid_mode", True),
        ("allow_multiple_reduction", True),
        ("prefer_overlap_with_compute", True),
        ("sl_idx", 3),
        ("num_allocated_qps", 0),
        ("num_cpu_timeout_secs", 300),
        ("num_gpu_timeout_secs", 100),
        ("explicitly_destroy", False),
    ],
    "ElasticBuffer.get_buffer_size_hint": [
        ("group", REQUIRED),
        ("num_max_tokens_per_rank", REQUIRED),
        ("hidden", REQUIRED),
        ("num_topk", 0),
        ("use_fp8_dispatch", False),
        ("allow_hybrid_mode", True),
        ("allow_multiple_reduction", True),
    ],
    "ElasticBuffer.dispatch": [
        ("x", REQUIRED),
        ("topk_idx", NONE),
        ("topk_weights", NONE),
        ("cumulative_local_expert_recv_stats", NONE),
        ("num_experts", NONE),
        ("num_max_tokens_per_rank", NONE),
        ("expert_alignment", NONE),
        ("num_sms", 0),
        ("num_qps", 0),
        *V2_EVENTS,
        ("handle", NONE),
        ("do_handle_copy", True),
        ("do_cpu_sync", NONE),
        ("do_expand", False),
        ("do_zero_padding", False),
        ("use_tma_aligned_col_major_sf", False),
    ],
    "ElasticBuffer.combine": [
        ("x", REQUIRED),
        ("handle", REQUIRED),
        ("topk_weights", NONE),
        ("bias", NONE),
        ("num_sms", 0),
        ("num_qps", 0),
        *V2_EVENTS,
    ],
    "ElasticBuffer.get_theoretical_num_sms": [
        ("num_experts", REQUIRED),
        ("num_topk", REQUIRED),
        ("num_scaleout_topk", 0),
        ("rdma_gbs", 0),
        ("nvlink_gbs", 0),
        ("sm_read_gbs", 200),
        ("sm_write_gbs", 50),
    ],
    "ElasticBuffer.get_theoretical_num_qps": [("num_sms", REQUIRED)],
    "ElasticBuffer.capture": [],
    "ElasticBuffer.barrier": [("use_comm_stream", True), ("with_cpu_sync", False), ("sequential", True)],
    "ElasticBuffer.get_comm_stream": [],
    "ElasticBuffer.get_physical_domain_size": [],
    "ElasticBuffer.get_logical_domain_size": [],
    "ElasticBuffer.destroy": [],
    "HybridEPBuffer": [
        ("group", REQUIRED),
        ("hidden_dim", REQUIRED),
        ("max_num_of_tokens_per_rank", REQUIRED),
        ("num_local_experts", REQUIRED),
        ("use_fp8", False),
        ("num_sms_dispatch_api", NONE),
        ("num_sms_combine_api", NONE),
        ("num_sms_preprocessing_api", NONE),
        ("num_blocks_permute", NONE),
        ("num_blocks_unpermute", NONE),
        ("load_cached_kernels", False),
        ("use_shared_buffer", True),
        ("enable_custom_allgather", False),
        ("num_of_hybrid_ep_ranks_per_nvlink_domain", NONE),
        ("use_mnnvl", NONE),
    ],
    "HybridEPBuffer.dispatch": [
        ("hidden", REQUIRED),
        ("scaling_factor", NONE),
        ("topk_idx", NONE),
        ("topk_weights", NONE),
        ("num_of_experts", NONE),
        ("probs", NONE),
        ("routing_map", NONE),
        ("num_dispatched_tokens_tensor", NONE),
        ("num_dispatched_tokens", NONE),
        ("handle", NONE),
    ],
    "HybridEPBuffer.combine": [("hidden", REQUIRED), ("probs", NONE), ("handle", NONE)],
    "HybridEPBuffer.dispatch_with_permute": [],
    "HybridEPBuffer.combine_with_unpermute": [],
    "HybridEPBuffer.update_template_config": [
        ("hidden_dim", NONE),
        ("max_num_of_tokens_per_rank", NONE),
        ("num_local_experts", NONE),
        ("use_fp8", NONE),
    ],
    "HybridEPBuffer.empty_jit_cache": [],
    "hybrid_ep_buffer.indices_to_map": [
        (name, REQUIRED) for name in ("topk_idx", "topk_weights", "num_of_tokens", "num_of_experts")
    ],
    "get_physical_domain_size": [("group", REQUIRED)],
    "get_logical_domain_size": [("group", REQUIRED), ("allow_hybrid_mode", True)],
}


def find(name):
    """Return the object with a dotted name."""
    found = deep_ep
    for part in name.split("."):
        found = getattr(found, part)
    return found


KEYWORDS = {  # keywords of verbs without other arguments
    "HybridEPBuffer.dispatch_with_permute": {
        "hidden": REQUIRED,
        "topk_idx": NONE,
        "topk_weights": NONE,
        "num_of_experts_per_rank": NONE,
        "num_of_experts": NONE,
        "use_fp8": NONE,
        "routing_map": NONE,
        "probs": NONE,
        "scaling_factor": NONE,
        "num_permuted_tokens": NONE,
        "pad_multiple": NONE,
        "handle": NONE,
        "non_blocking": False,
        "fuse_permute_dispatch": False,
        "num_dispatched_tokens": NONE,
        "use_host_meta": NONE,
    },
    "HybridEPBuffer.combine_with_unpermute": {
        "hidden": REQUIRED,
        "probs": NONE,
        "handle": NONE,
        "pad_multiple": NONE,
        "fuse_unpermute_combine": False,
        "num_dispatched_tokens": NONE,
    },
    "Buffer": {"allow_nvlink_for_normal_mode": True},
    "Buffer.low_latency_dispatch": {
        "topk_weights": NONE,
        "x_global_scale": NONE,
        "use_nvfp4": False,
        "use_ue8m0_for_sf": False,
    },
    "Buffer.low_latency_combine": {
        "overlap": False,
        "src_signals": NONE,
        "src_signal_expect_value": 0,
        "packed_recv_count": NONE,
        "comp_signal": NONE,
        "block_m": 64,
        "threshold": 0,
        "num_sms": 3,
    },
}


@pytest.mark.parametrize("name", VERBS)
def test_arguments(name):
    """Names, order and defaults equal deep_ep's; additions are keyword-only; other keywords are refused."""
    parameters = [p for p in inspect.signature(find(name)).parameters.values() if p.name != "self"]
    assert [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == VERBS[name]
    assert {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} == KEYWORDS.get(name, {})
    assert all(p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in parameters), "*args or **kwargs"


def test_unknown_keywords_are_errors():
    """A misspelt keyword is an error."""
    with pytest.raises(TypeError, match="num_mxa"):
        deep_ep.Config(num_mxa_nvl_chunked_send_tokens=3)
    with pytest.raises(TypeError, match="num_nvl_peers"):
        moecomm.run_local(lambda comm: deep_ep.Buffer(comm, num_nvl_peers=8), 1)


def test_attributes():
    """Attributes that callers read of a Buffer; statics that callers may replace."""

    def look(buffer):
        assert (
            buffer.rank,
            buffer.group_size,
            buffer.num_nvl_bytes,
            buffer.num_rdma_bytes,
            buffer.low_latency_mode,
        ) == (0, 1, 5, 6, True)
        assert (
            buffer.group.size == 1
            and buffer.num_sms == deep_ep.Buffer.num_sms == 20
            and buffer.runtime.get_num_rdma_ranks() == 1
        )
        assert buffer.runtime.is_available() and buffer.get_comm_stream() is None
        assert buffer.capture().event is not None and isinstance(
            buffer.get_dispatch_config(8), deep_ep.Config
        )
        buffer.destroy()
        assert not buffer.runtime.is_available()
        with pytest.raises(moecomm.InvalidArgument, match="the Buffer was destroyed"):
            buffer.get_dispatch_layout(torch.zeros(1, 1, dtype=torch.int64), 1)

    with_buffer(look, num_nvl_bytes=5, num_rdma_bytes=6, low_latency_mode=True, explicitly_destroy=True)
    deep_ep.Buffer.set_num_sms(24)
    assert deep_ep.Buffer.num_sms == 24 and deep_ep.Buffer.get_combine_config(4).num_sms == 24
    deep_ep.Buffer.set_num_sms(20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deep_ep.Buffer, "get_dispatch_config", staticmethod(lambda ranks: "mine"))
        with pytest.raises(moecomm.InvalidArgument, match="config is a str"):
            with_buffer(lambda b: b.dispatch(torch.zeros(1, 8)))


def test_events():
    """None when synchronous; usable as `with`, also in the call form; hooks run once, after a wait."""
    ran = []
    event = deep_ep.EventOverlap(deep_ep.EventHandle(), (torch.ones(1),))
    event.register_hook_after_wait(lambda: ran.append(1))
    with event:
        assert not ran
    event.current_stream_wait()
    assert ran == [1] and event.event is not None
    with event(release_handle=True):
        pass
    assert event.event is None and event.extra_tensors is None
    deep_ep.EventOverlap().current_stream_wait()


def test_size_hints():
    """Size hints in bytes, on one node and several, which grow with the shape."""
    config = deep_ep.Config(num_sms=24, num_max_nvl_chunked_recv_tokens=512)
    assert config.get_nvl_buffer_size_hint(14336, 8) > config.get_nvl_buffer_size_hint(7168, 8) > 0
    assert config.get_rdma_buffer_size_hint(14336, 8) == 0 < config.get_rdma_buffer_size_hint(14336, 16)
    assert deep_ep.Buffer.get_low_latency_rdma_size_hint(128, 7168, 16, 256) > 128 * 256 * 7168 * 2
