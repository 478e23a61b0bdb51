"""How a call of a Buffer runs: between its hooks, at once or on the communicator's progress thread; and what calls have moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from collections import OrderedDict

import torch
from torch.utils.hooks import RemovableHandle

from ._cuda import cuda
from .errors import InvalidArgument, raise_failure
from .refusals import Part, made
from .results import Handle, Pending

_STAGES = ("pre_dispatch", "post_dispatch", "pre_combine", "post_combine")


class Calls:
    """The hooks of Buffer, which says comm; and its calls."""

    def register_hook(self, stage: str, fn: Callable[..., Any]) -> Any:
        """Call fn at a stage of every dispatch and combine of this rank; forward calls only.

        Parameters
        ----------
        stage : str
            "pre_dispatch": fn(x), "post_dispatch": fn(Dispatched), "pre_combine": fn(rows), "post_combine": fn(y).
            What fn returns is ignored. With async_op, "post" stages run in wait().
        fn : callable

        Returns
        -------
        torch.utils.hooks.RemovableHandle
            .remove() ends it.

        Raises
        ------
        InvalidArgument
            There is no such stage.
        """
        if stage not in _STAGES:
            raise InvalidArgument(
                f"register_hook: stage is {stage!r}; expected one of {', '.join(_STAGES)}", op="register_hook"
            )
        self._can_use_fast_path = False
        hooks = self._hooks.setdefault(stage, OrderedDict())
        handle = RemovableHandle(hooks)
        hooks[handle.id] = fn
        return handle

    def _run_hooks(self, stage, value):
        for fn in list(self._hooks.get(stage, {}).values()):
            fn(value)

    def _call(self, op, run, async_op, through_ops, first, *rest):
        """One call between its hooks, here or on the progress thread."""
        if self._hooks:
            self._run_hooks("pre_" + op, first)
            self._require_open(op)  # a hook may have closed it
        if not async_op:
            self.comm._settle()
            if through_ops:  # the operator tells what it refuses; it does not run where its results were kept
                made(self)
            result = run(first, *rest)
            if self._hooks:
                self._run_hooks("post_" + op, result)
            return result

        def work():
            with (
                torch.set_grad_enabled(through_ops),
                Part(self, op, rest[0] if op == "combine" else None),
            ):  # the mode is a thread's own
                if through_ops:
                    made(self)
                return run(first, *rest)

        then = lambda result: self._run_hooks("post_" + op, result)  # noqa: E731
        if self.comm._gpu is not None:
            return cuda.Pending(self.comm, work, (first, rest), then)
        return Pending(self.comm, work, (first, rest), then)

    @property
    def captured_bytes(self) -> int:
        """Bytes of the arena that calls in CUDA graphs keep (release_captured); 0 in the cpu world."""
        return self._native.captured_bytes() if self.comm._gpu is not None else 0

    def release_captured(self) -> None:
        """Give back what calls in CUDA graphs keep. Local. No graph with calls of this buffer may be replayed any more.

        A captured dispatch keeps its piece of the arena and its plan, a captured combine those of its dispatch, after the last
        handle and tensor of them are gone: every replay writes there again. Without this call they are kept until the
        buffer is closed, and every capture adds its own.
        """
        self._require_open("release_captured")
        if self.comm._gpu is not None:
            self._native.release_captured()

    def stats(self) -> dict[str, Any]:
        """Rows and bytes per hop since the last call; calling resets them.

        Returns a dict: rail and node, each {logical_rows, physical_rows, logical_bytes, physical_bytes}
        (physical: what crossed the hop's link), replicated_rows, quantized_rows, staged_rows, calls, exchanges (rounds in
        which every rank waited for the counts of all others); and under "decode" the same of the decode path, where it was used.
        """
        self._require_open("stats")
        counted = self._native.take_counters()
        if self._gpu_recorder:
            self._gpu_recorder.forget_counts()
        decode = self._decode
        if decode is not None:
            counted["decode"] = decode.native.take_counters()
        return counted

    def _release(self):
        self.comm._settle()
        try:
            if self._recorder:
                self._recorder.close()  # an incomplete recording is a warning, which may be an error here
        finally:
            if not self.comm._bootstrap.threads:  # rank threads reach it by pointer until all have ended
                self._native.release()
                self._decode = None
            if self._host_router_buffer is not None:
                self._host_router_buffer.close()
                self._host_router_buffer.comm.close()

    def _fail(self, op, failure):
        raise_failure(failure, op=op, rank=self.comm.rank, describe_capacity=self._describe_capacity)

    def _describe_capacity(self, failure):
        if failure.detail == 1:
            return "A larger `capacity` of dispatch enlarges it."
        held, blocks, total = self._native.arena()
        graphs = self.captured_bytes
        kept = f"; calls in CUDA graphs keep {graphs} of these until release_captured()" if graphs else ""
        return (
            f"This rank's arena has {total} bytes, of which {blocks} pieces of earlier dispatches hold {held}: drop their tensors and "
            f"handles, or give Buffer a larger `arena_bytes`{kept}."
        )

    def _require_open(self, op):
        if self._closed:
            self._refuse(op, "the buffer is closed")
        self.comm._require_open(op)

    def _handle_of(self, layout, capacity, plan, output):
        return Handle(
            self, layout, capacity, plan.rows(self.comm.local_rank), plan.tokens, plan=plan, output=output
        )
