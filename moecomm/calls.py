"""Runs the calls of a Buffer between its hooks, immediately or on the communicator's progress thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ._cuda import streams
from .first_phase import FirstPhase
from .refusals import Part, made
from .results import Pending, PendingDispatch

if TYPE_CHECKING:
    from .backend import Backend


class Calls:
    """Runs the calls of one Backend."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def run(
        self,
        op: str,
        call: Callable[..., Any],
        async_op: bool,
        through_ops: bool,
        first: Any,
        *rest: Any,
    ) -> Any:
        """Call call(first, *rest) between the hooks, here or on the progress thread."""
        backend = self._backend
        hooks, memory = backend.hooks, backend.memory
        comm = memory.comm
        if hooks.any:
            hooks.run("pre_" + op, first)
            memory.require_open(op)  # a hook may have closed the buffer
        if not async_op:
            comm.order.settle()
            if through_ops:  # the operator reports its own refusals; it is skipped if its results were saved
                made(backend)
            result = call(first, *rest)
            if hooks.any:
                hooks.run("post_" + op, result)
            return result

        def work() -> Any:
            with (
                torch.set_grad_enabled(through_ops),
                Part(backend, op, rest[0] if op == "combine" else None),
            ):  # the mode belongs to the thread
                if through_ops:
                    made(backend)
                return call(first, *rest)

        def then(result: Any) -> None:
            hooks.run("post_" + op, result)

        if op != "dispatch":
            if comm.gpu is not None:
                return streams.Pending(comm, work, (first, rest), then)
            return Pending(comm, work, (first, rest), then)
        phase = FirstPhase()

        def dispatch() -> Any:
            with phase.of_call():
                return work()

        if comm.gpu is not None:
            return streams.PendingDispatch(comm, dispatch, (first, rest), then, phase)
        return PendingDispatch(comm, dispatch, (first, rest), then, phase)
