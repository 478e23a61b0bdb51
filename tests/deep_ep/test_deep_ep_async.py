"""An asynchronous dispatch of the drop-in returns when its counts are known; its event waits for the rows."""

import gc
import json
import weakref

import early_return
import pytest
import torch
from emulated_gpu import either_world  # noqa: F401 - a fixture

import moecomm


@pytest.mark.parametrize("kind", early_return.KINDS)
@pytest.mark.parametrize("ending", ["continued", "killed", "killed, combined"])
def test_return_before_a_stalled_payload(processes, tmp_path, kind, ending):
    """Rank 1 is stopped between its counts and its rows: rank 0 has the shapes and counts, and the event the rows."""
    ranks = [
        processes.Process(target=early_return.main, args=(str(tmp_path), r, kind, ending))
        for r in range(early_return.SIZE)
    ]
    try:
        for p in ranks:
            p.start()
        ranks[0].join(40)
        assert ranks[0].exitcode == 0
        seen = json.loads((tmp_path / "0.json").read_text())
        assert seen.pop("stopped") == "T", seen
        error = seen.pop("error", None)
        if ending == "continued":
            assert error is None and all(seen.values()) and {"rows", "again", "combined"} <= seen.keys(), (
                seen,
                error,
            )
        else:
            assert error["type"] == "PeerLost" and error["peer"] == 1 and all(seen.values()), (seen, error)
    finally:
        for p in ranks:
            p.kill()
            p.join()


@pytest.mark.parametrize("kind", early_return.KINDS)
def test_rows_equal_those_of_a_synchronous_call(either_world, kind):  # noqa: F811
    """Both worlds; and a handle keeps nothing of the result once the rows are there."""

    def main(comm):
        calls = early_return.KINDS[kind](comm)
        ids = torch.arange(8, device=comm.device).view(4, 2).roll(comm.rank, 0)
        x = torch.full((4, early_return.HIDDEN), 1.0 + comm.rank, dtype=torch.bfloat16, device=comm.device)
        want, first, _ = calls.dispatch(x, ids, later=False)
        rows, handle, event = calls.dispatch(x, ids)
        event.current_stream_wait()
        assert torch.equal(rows, want)
        if kind != "Normal":
            assert handle.num_recv_tokens == first.num_recv_tokens
        assert torch.equal(calls.buffer.combine(rows, handle)[0], calls.buffer.combine(want, first)[0])
        kept = weakref.ref(rows)
        del rows
        event.current_stream_wait(True)
        gc.collect()
        assert kept() is None

    moecomm.run_local(main, 2)
