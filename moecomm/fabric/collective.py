"""The collective verbs of Domain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from ..checks import require
from ..errors import InvalidArgument
from ..results import Pending
from .arguments import Arguments
from .requests import Multicast, Reduce

if TYPE_CHECKING:
    from ..communicator import Communicator

_ARGUMENTS, _ERROR = 1, 3  # of Why in csrc/base/types.hpp


class Collective(Arguments):
    """The part of Domain with the collective verbs. Expects these attributes of Domain."""

    comm: Communicator
    _native: Any
    _fast: Any  # the native domain if it has the methods try_*, else None
    _fail: Callable[[str, Any], NoReturn]
    _require_open: Callable[[str], None]
    _settle: Callable[[], Any]
    _running: Callable[[], str | None]
    _run: Callable[..., Pending[None] | None]

    def multicast(
        self, ranks: Sequence[int], dst: Any, src: Any = None, *, root: int, async_op: bool = False
    ) -> Pending[None] | None:
        """Write the same rows into the memory of many ranks. Collective.

        Rows cross the rail to each node once; the rank that receives them copies them inside its node. No link carries
        a row twice. On the root, the call returns when src may be overwritten; on receivers, when dst is written. The
        dst of a rank is not written before that rank makes the call.

        Parameters
        ----------
        ranks : sequence of int
            The receivers. The root may be one of them.
        dst : symmetric Tensor, or list of them
            This rank's tensor. The receivers are written at the same offset.
        src : Tensor, or list of them, of dst's shapes and dtypes
            On the root only. It is copied first if its strides do not allow the rows of dst.
        root : int
        async_op : bool
            Return a Pending at once.

        Raises
        ------
        InvalidArgument
            An argument is invalid on some rank; raised on all ranks.
        ConfigMismatch
            Ranks differ in ranks, root or dst; raised on all ranks.
        PeerLost, PeerTimeout
            A rank has ended, or does not make the call within the timeout.
        """
        fast = self._fast
        if fast is not None and self.comm.order.ready and not async_op:
            failure = fast.try_multicast(ranks, dst, src, root)
            if failure is None:
                return None
            if failure is not False:
                self._fail("multicast", failure)
        return self.submit([Multicast(ranks, dst, root, src)], async_op=async_op)

    def reduce(
        self,
        ranks: Sequence[int],
        dst: Any,
        src: Any,
        *,
        root: int,
        op: str = "sum",
        accumulate: torch.dtype = torch.float32,
        async_op: bool = False,
    ) -> Pending[None] | None:
        """Sum the rows of many ranks at one rank. Collective.

        Each node sums the rows of its ranks in ascending order and rounds the sum to their dtype. This row crosses the
        rail. The root adds the sums of the nodes in ascending order (that of its node unrounded) and rounds once.
        Results are bit-identical from run to run.

        Parameters
        ----------
        ranks : sequence of int
            The contributors. The root may be one of them.
        dst : Tensor, or list of them, of src's shapes and dtypes
            On the root only; None elsewhere.
        src : symmetric Tensor, or list of them; bfloat16, float16, float32 or float64
            The contribution of this rank. It may be overwritten when the call returns.
        root : int
        op : str
            "sum".
        accumulate : torch.dtype
            Dtype of the sums: float32, or float64 for float64 rows.
        async_op : bool
            Return a Pending at once.

        Raises
        ------
        InvalidArgument, ConfigMismatch, PeerLost, PeerTimeout
            As in multicast.
        """
        fast = self._fast
        usual = op == "sum" and accumulate is torch.float32
        if fast is not None and usual and self.comm.order.ready and not async_op:
            failure = fast.try_reduce(ranks, dst, src, root)
            if failure is None:
                return None
            if failure is not False:
                self._fail("reduce", failure)
        wide = (
            torch.float64
            if _first_dtype(src) == torch.float64 and accumulate == torch.float32
            else accumulate
        )
        return self.submit([Reduce(ranks, src, root, dst, op, wide)], async_op=async_op)

    def submit(
        self, requests: Sequence[Multicast | Reduce], *, async_op: bool = False
    ) -> Pending[None] | None:
        """Execute several multicasts, or several reductions, in one call, with one synchronization. Collective.

        Parameters
        ----------
        requests : sequence of Multicast, or of Reduce
            The same on all ranks, except for the tensors that only the root has. Requests must not write overlapping
            memory.
        async_op : bool
            Return a Pending at once.

        Raises
        ------
        InvalidArgument, ConfigMismatch, PeerLost, PeerTimeout
            As in multicast.
        """
        verb = "submit"
        self._require_open(verb)
        try:
            good = isinstance(requests, (list, tuple)) and len({type(r) for r in requests}) == 1
            require(good, verb, "requests", requests, "a list of Multicast, or one of Reduce")
            verb = {Multicast: "multicast", Reduce: "reduce"}.get(type(requests[0]), verb)
            require(verb != "submit", verb, "requests", requests, "a list of Multicast, or one of Reduce")
            made = [self._group_call(verb, r) for r in requests]
        except Exception as error:
            self._refuse(verb, error)
            raise
        calls = [call for call, _, _ in made]
        native = self._native.multicast if verb == "multicast" else self._native.reduce

        def run() -> Any:
            failure = native(calls, 0)
            if failure is None:
                for _, _, finish in made:
                    if finish is not None:
                        finish()
            return failure

        return self._run(verb, run, made, async_op)

    def _refuse(self, verb: str, error: Exception) -> None:
        """Report to the peers, in the collective call that they make, that this rank refuses it."""
        if self.size == 1 or self._running() is not None:
            return
        why = _ARGUMENTS if isinstance(error, InvalidArgument) else _ERROR
        self._settle()
        refuse = self._native.reduce if verb == "reduce" else self._native.multicast
        failure = refuse([], why)
        if failure is not None and failure.code != "refused" and hasattr(error, "add_note"):
            error.add_note(
                f"The refusal could not be reported to all other ranks (phase {failure.phase}: {failure.code})."
            )


def _first_dtype(value: Any) -> Any:
    first = value[0] if isinstance(value, (list, tuple)) and value else value
    return getattr(first, "dtype", None)
