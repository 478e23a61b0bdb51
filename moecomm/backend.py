"""Backend: the native calls of a Buffer, with checked arguments.

Handles, operators and derivatives need only this part of a Buffer, and keep it alive instead of the Buffer. It does
not use the other parts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ._native.quant import scale_words
from .arguments import Checks
from .first_phase import take_first_phase
from .hooks import Hooks
from .refusals import made
from .results import BlockTensors, Dispatched, Handle
from .shapes import QUANTS, SCALE_DTYPES, WIRES
from .tensors import address
from .windows import TooSmall

if TYPE_CHECKING:
    from .memory import BufferMemory
    from .opaque import Opaque

_QUANT_NAMES = list(QUANTS)


class Backend:
    """The native calls of one Buffer.

    .memory, .checks, .hooks are its parts. .name identifies it in torch.ops.moecomm.* of this process. .router chooses
    the replicas of picks, or is None; .choosing is the native memory for that choice. .beside: for tensors on a GPU,
    the Buffer on the host with that memory, which exchanges picks but no rows. .recorder records calls, or is None;
    .gpu_recorder is the same if Python must report each call to it. .fast: the native memory if a call with plain
    arguments needs only that, else None.
    """

    def __init__(self, memory: BufferMemory, hooks: Hooks, router: Any) -> None:
        self.memory, self.checks, self.hooks, self.router = memory, Checks(memory), hooks, router
        self.name = ""
        self.recorder: Any = None
        self.gpu_recorder: Any = None
        self.choosing: Any = None
        self.beside: Any = None
        self.fast: Any = None
        self.fail = memory.fail

    def find_fast_way(self) -> None:
        """Set .fast. Call this after a change of anything that it depends on."""
        memory = self.memory
        plain = memory.comm.gpu is None and self.router is None and not self.hooks.any
        self.fast = memory.native if plain and not memory.closed else None

    def use(self, windows: Any) -> None:
        """Use these Windows for the following calls."""
        self.memory.use(windows)
        self.find_fast_way()

    def grow(self, op: str, tokens: int, failure: Any) -> None:
        """Make space for a call that failed on all ranks. Collective."""
        self.memory.grow(op, tokens, failure)
        self.find_fast_way()

    def take_counters(self) -> dict[str, Any]:
        """See Buffer.stats."""
        memory = self.memory
        counted: dict[str, Any] = memory.native.take_counters()
        if self.gpu_recorder:
            self.gpu_recorder.forget_counts()
        if memory.decode is not None:
            counted["decode"] = memory.decode.native.take_counters()
        return counted

    def close(self) -> None:
        """See Buffer.close."""
        memory = self.memory
        if not memory.closed:
            memory.closed, self.fast = True, None
            if not memory.comm.native.after_call(self._release):
                self._release()

    def _release(self) -> None:
        comm = self.memory.comm
        comm.order.settle()
        try:
            if self.recorder:
                self.recorder.close()  # may warn of an incomplete recording, and warnings may be errors
        finally:
            # Rank threads access this memory by pointer until all of them have ended.
            self.memory.release(now=not comm.bootstrap.threads)
            if self.beside is not None:
                self.beside.close()
                self.beside.comm.close()

    def retire(self) -> Callable[[], None]:
        """Stop serving: the Backend of the next generation has replaced this one. Return what releases its memory."""
        if self.recorder is not None:
            self.recorder.close()
        windows = self.memory.windows

        def release() -> None:
            if windows is not None:
                windows.leave(release=True)

        return release

    def handle_of(self, layout: str, capacity: int | None, plan: Any, output: Any, native: Any) -> Handle:
        """Make the Handle of a dispatch."""
        return Handle(
            self,
            layout,
            capacity,
            plan.rows(self.memory.comm.local_rank),
            plan.tokens,
            native=native,
            plan=plan,
            output=output,
        )

    def dispatch(
        self,
        x: torch.Tensor,
        scales: torch.Tensor | None,
        topk_ids: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        layout: str,
        expert_alignment: int,
        capacity: int | None,
        handle: Handle | None = None,
        quant: str | None = None,
        by_column: bool = False,
        lost: torch.Tensor | None = None,
        layer: int = 0,
        opaque: Opaque | None = None,
    ) -> Dispatched:
        """Run Buffer.dispatch with checked arguments.

        Raises
        ------
        MoecommError
        """
        memory, router, gpu_recorder = self.memory, self.router, self.gpu_recorder
        if opaque is not None:
            kind, row_bytes, scale_bytes = 0, opaque.row_bytes, opaque.side_bytes
        else:
            kind = QUANTS[quant] if scales is None else SCALE_DTYPES.index(scales.dtype)
            row_bytes = memory.hidden if kind else memory.row_bytes
            scale_bytes = 4 * scale_words(memory.hidden, kind)
        tokens, request = x.shape[0], None
        if router is not None and handle is None:
            if self.beside is not None:
                topk_ids = router.choose(self, "dispatch", topk_ids, layer)
            else:
                request = router.request(topk_ids, layer)
                topk_ids = request.ids
        began = gpu_recorder and gpu_recorder.start()
        plan = None if handle is None else handle.plan
        dtype = torch.float8_e4m3fn if kind else x.dtype
        phase = take_first_phase()

        def result_of(native: Any, capacity: int | None, plan: Any, block: Any, output: Any) -> Dispatched:
            own = self.handle_of(layout, capacity, plan, output, native)
            tensors = BlockTensors(
                own, block, dtype, row_bytes, scale_bytes, SCALE_DTYPES[kind], by_column, opaque
            )
            return Dispatched(own, lost, tensors)

        while True:
            native = memory.native if handle is None or plan is None else handle.memory
            made(self)
            if phase is not None:
                phase.native.make = partial(result_of, native, capacity)
            if plan is None and tokens > memory.max_tokens:
                result = memory.ask_for_room()
            else:
                result = native.dispatch(
                    address(x),
                    address(scales),
                    address(topk_ids),
                    topk_ids is not None and topk_ids.dtype == torch.int32,
                    address(topk_weights),
                    tokens,
                    layout == "rank",
                    expert_alignment,
                    -1 if capacity is None else capacity,
                    row_bytes,
                    scale_bytes,
                    plan,
                    kind,
                    by_column,
                    request and request.native,
                    0 if opaque is None else opaque.signature,
                    *(() if phase is None or memory.comm.gpu is not None else (phase.native,)),
                )
            if type(result) is tuple:
                break
            try:
                self.fail("dispatch", result)
            except TooSmall as small:  # on all ranks; they repeat the call with larger memory
                self.grow("dispatch", tokens, small.failure)
            if handle is not None and plan is not None:
                # No space in the memory of its plan: make a new plan with the same picks and order of rows.
                topk_ids = torch.empty((tokens, memory.top_k), dtype=torch.int64, device="cpu")
                plan.picks(topk_ids.numpy())
                expert_alignment, capacity, plan = plan.alignment, handle.capacity, None
        plan = result[0]
        if request is not None:
            router.record(request, layer)
            topk_ids = request.slots
        if gpu_recorder:
            gpu_recorder.dispatch(
                began,
                plan,
                topk_ids,
                topk_weights,
                tokens,
                layout,
                expert_alignment,
                capacity,
                _QUANT_NAMES[kind],
            )
        out = result_of(native, capacity, *result)
        return out if phase is None else phase.finish(out)

    def combine(
        self,
        rows: torch.Tensor,
        handle: Handle,
        topk_weights: torch.Tensor | None,
        bias: torch.Tensor | None,
        out: torch.Tensor | None = None,
        wire: str | None = None,
        back: torch.Tensor | None = None,
        sums_back: bool = False,
    ) -> Any:
        """Run Buffer.combine with checked arguments. Return y; with `back` (y, values sent back [T, top_k]).

        Raises
        ------
        MoecommError
        """
        memory, gpu_recorder = self.memory, self.gpu_recorder
        tokens, plan, device = handle.num_tokens, handle.plan, memory.comm.device
        y = out
        if y is None:
            y = torch.empty((tokens, memory.hidden), dtype=memory.dtype, device=device)
        bias_stride = 0
        if bias is not None:
            bias = bias.to(torch.float32).contiguous()
            bias_stride = memory.hidden if bias.dim() == 2 else 0
        slots = None
        if back is not None:
            # A rank without tokens needs slots too: values of its peers pass through it.
            slots = torch.empty((max(tokens, 1), memory.top_k), dtype=torch.float32, device=device)
        began = gpu_recorder and gpu_recorder.start()
        made(self)
        failure = handle.memory.combine(
            address(rows),
            address(topk_weights),
            address(y),
            address(bias),
            bias_stride,
            plan,
            handle.output,
            address(back),
            address(slots),
            WIRES[wire],
            sums_back,
        )
        if failure is not None:
            self.fail("combine", failure)
        if gpu_recorder:
            gpu_recorder.combine(began, plan, tokens, topk_weights is not None, handle.layout, wire)
        return y if slots is None else (y, slots[:tokens])
