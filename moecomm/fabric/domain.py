"""Domain: symmetric memory over the ranks of both networks, and the verbs on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch

from .._cuda import cuda
from .._cuda.domain import NativeDomain
from .._native import core
from ..shapes import require_comm
from ..checks import integer, require
from ..communicator import Communicator
from ..errors import CapacityExceeded, ConfigMismatch, InvalidArgument, raise_failure
from ..results import Pending
from ..shared import Shared
from .collective import Collective
from .heap import Heap


class Domain(Collective, Shared):
    """Memory that every rank of a communicator can access over both networks. Construction is collective.

    Parameters
    ----------
    comm : Communicator
        Of the cpu world or of the cuda world.
    bytes : int
        Size of this rank's memory for tensors, equal on all ranks. On CPUs it is committed when it is first touched.
    counters : int
        Number of counters that every rank has for every source.
    num_sms : int
        On GPUs: number of multiprocessors for its kernels.

    Raises
    ------
    InvalidArgument
        An argument is invalid on some rank, or the ranks on a GPU need more multiprocessors than it has.
    ConfigMismatch
        Ranks differ in an argument.

    Source: DeepSeek-AI, "Insights into DeepSeek-V3" (arXiv 2505.09343), on one interface for both networks.
    """

    def __init__(self, comm: Communicator, bytes: int, *, counters: int = 64, num_sms: int = 8) -> None:
        require_comm(comm)
        self.comm, self._closed = comm, False
        self._require_open("Domain")
        self.rank, self.size, self.ranks_per_node = comm.rank, comm.size, comm.ranks_per_node

        def arguments() -> dict[str, Any]:
            op = "Domain"
            return {
                "bytes": integer(op, "bytes", bytes, 1, 1 << 46),
                "counters": integer(op, "counters", counters, 1, 1 << 16),
                "num_sms": integer(op, "num_sms", num_sms, 1, 1 << 10),
            }

        self._settle, self._member = comm.order.settle, comm.native
        self._running = self._member.running
        same = self._agree("Domain", arguments)
        self._space = Heap(Heap.rounded(same["bytes"]))
        self.bytes, self.counters, self.num_sms = self._space.size, same["counters"], same["num_sms"]
        self._device, self._on_gpu = comm.device, comm.gpu is not None
        self._native: Any = comm.collective.join("Domain", self._make())
        self._native.finish_connect()
        self._fast: Any = None if self._on_gpu else self._native
        ranks = comm.bootstrap
        self._threads = ranks.threads  # ranks access each other's memory by pointer
        if self._threads:
            ranks.keep(self._native)
        memory = self._native.memory(self.bytes)
        self._memory: torch.Tensor = (
            cuda.memory_of(memory) if self._on_gpu else torch.frombuffer(memory, dtype=torch.uint8)
        )
        self._begin, self._heap = self._memory.data_ptr(), self._native.heap
        self._sends_own = self._on_gpu and self._native.from_window_only()

    def _make(self) -> Callable[[], Any]:
        """Return a function that makes the native domain of this rank."""
        if not self._on_gpu:
            return lambda: core.Domain(self._member, self.bytes, self.counters)
        plan = cuda.domain_plan_of(self)
        return lambda: NativeDomain(self.comm, plan, self.bytes, self.counters)

    # -- memory -----------------------------------------------------------------------------------

    def tensor(self, shape: int | Sequence[int], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """Allocate a symmetric tensor: one of the same shape at the same offset on every rank. Collective.

        Its values are not initialized. Its memory is taken until free() or close(), even if no tensor refers to it.

        Parameters
        ----------
        shape : int or sequence of int
        dtype : torch.dtype

        Returns
        -------
        Tensor of that shape, on the communicator's device
            That of this rank. Its views are symmetric too, and every verb accepts them.

        Raises
        ------
        InvalidArgument
            The shape or dtype is invalid.
        ConfigMismatch
            Ranks differ in the shape or dtype.
        CapacityExceeded
            No free piece of the domain's memory is large enough.
        """
        op = "tensor"
        self._require_open(op)

        def piece() -> dict[str, Any]:
            dims = (shape,) if isinstance(shape, int) else shape
            require(isinstance(dims, (tuple, list)), op, "shape", shape, "a sequence of ints")
            dims = [integer(op, "shape", n, 0, 1 << 46) for n in dims]
            require(isinstance(dtype, torch.dtype), op, "dtype", dtype, "a torch.dtype")
            size = dtype.itemsize
            for n in dims:
                size *= n
            at = self._space.find(Heap.rounded(size))
            if at is None:
                raise CapacityExceeded(
                    f"tensor: {dtype} {dims} needs {size} bytes, but no free piece of the {self.bytes} bytes is large "
                    f"enough ({self._space.held} are taken); pass a larger `bytes` to Domain, or call free() before",
                    op=op,
                    rank=self.rank,
                    expected=size,
                    got=self.bytes - self._space.held,
                )
            return {"shape": dims, "dtype": str(dtype), "offset": at, "bytes": size}

        same = self._agree(op, piece)
        at, size = same["offset"], same["bytes"]
        self._space.take(at, Heap.rounded(size))
        return self._memory[at : at + size].view(dtype).view(same["shape"])

    def free(self, tensor: torch.Tensor) -> None:
        """Free the memory of a tensor on all ranks. The next tensor() may use it. Collective.

        Raises
        ------
        InvalidArgument
            The tensor is not one that tensor() has returned, or it is free already.
        ConfigMismatch
            Ranks free different tensors.
        """
        op = "free"
        self._require_open(op)

        def piece() -> dict[str, Any]:
            known = isinstance(tensor, torch.Tensor) and self._space.holds(tensor.data_ptr() - self._begin)
            require(
                known, op, "tensor", tensor, "a tensor that tensor() has returned and that is not free yet"
            )
            return {"offset": tensor.data_ptr() - self._begin}

        self._space.release(self._agree(op, piece)["offset"])

    # -- one-sided --------------------------------------------------------------------------------

    def write(
        self,
        dst_rank: int,
        dst: Any,
        src: Any,
        *,
        dst_rows: torch.Tensor | None = None,
        src_rows: torch.Tensor | None = None,
        counter: int | None = None,
        async_op: bool = False,
    ) -> Pending[None] | None:
        """Write into the memory of a rank. One-sided: that rank makes no call.

        Returns when src may be overwritten. The bytes are written when the rank sees a later signal() of this rank,
        when it sees `counter`, or after fence().

        Parameters
        ----------
        dst_rank : int
            May be this rank.
        dst : symmetric Tensor, or list of them
            This rank's tensor. dst_rank is written at the same offset.
        src : Tensor, or list of them, of dst's shapes and dtypes
            With any strides. Rows are not staged. Strided rows are written one by one.
        dst_rows, src_rows : int64 or int32 vectors, optional
            Row i of the request is dst[dst_rows[i]] = src[src_rows[i]]. None: row i of that tensor.
        counter : int, optional
            A counter that dst_rank has for this rank. It grows by the number of bytes when they are written.
        async_op : bool
            Return a Pending at once.

        Raises
        ------
        InvalidArgument
        PeerLost, PeerTimeout
            The connection to dst_rank has ended, or it does not accept the bytes within the timeout.
        """
        fast = self._fast
        if (
            fast is not None
            and self.comm.order.ready
            and dst_rows is None
            and src_rows is None
            and not async_op
        ):
            failure = fast.try_write(dst_rank, dst, src, counter)
            if failure is None:
                return None
            if failure is not False:
                self._fail("write", failure)
        self._require_open("write")
        rank = self._check_rank("write", "dst_rank", dst_rank)
        number = -1 if counter is None else self._check_counter("write", counter)
        rows, keep = self._one_sided("write", rank, dst, src, dst_rows, src_rows)
        return self._run("write", lambda: self._native.write(rank, rows, number), keep, async_op)

    def read(
        self,
        src_rank: int,
        dst: Any,
        src: Any,
        *,
        dst_rows: torch.Tensor | None = None,
        src_rows: torch.Tensor | None = None,
        async_op: bool = False,
    ) -> Pending[None] | None:
        """Read from the memory of a rank. One-sided: that rank makes no call.

        Returns when dst is written. The read sees all earlier writes of this rank to that rank.

        Parameters
        ----------
        src_rank : int
        dst : Tensor, or list of them
        src : symmetric Tensor, or list of them, of dst's shapes and dtypes
            This rank's tensor. src_rank is read at the same offset.
        dst_rows, src_rows, async_op
            As in write.

        Raises
        ------
        InvalidArgument
        PeerLost, PeerTimeout
            The connection to src_rank has ended, or it does not answer within the timeout.
        """
        fast = self._fast
        if (
            fast is not None
            and self.comm.order.ready
            and dst_rows is None
            and src_rows is None
            and not async_op
        ):
            failure = fast.try_read(src_rank, dst, src)
            if failure is None:
                return None
            if failure is not False:
                self._fail("read", failure)
        self._require_open("read")
        rank = self._check_rank("read", "src_rank", src_rank)
        rows, keep = self._one_sided("read", rank, dst, src, dst_rows, src_rows)
        return self._run("read", lambda: self._native.read(rank, rows), keep, async_op)

    def signal(self, dst_rank: int, counter: int, add: int = 1) -> None:
        """Add to a counter that a rank has for this rank, after all earlier writes of this rank to it.

        Raises
        ------
        InvalidArgument
        """
        self._require_open("signal")
        rank = self._check_rank("signal", "dst_rank", dst_rank)
        number, more = self._check_counter("signal", counter), integer("signal", "add", add, 1, 1 << 62)
        self._run("signal", lambda: self._native.signal(rank, number, more), None, False)

    def wait(
        self, src_rank: int, counter: int, at_least: int, *, async_op: bool = False
    ) -> Pending[None] | None:
        """Wait until a counter for a source has at least this value. Earlier writes of the source are visible then.

        Counters begin at 0 and only grow.

        Raises
        ------
        InvalidArgument
        PeerLost, PeerTimeout
            The source has ended, or does not signal within the timeout.
        """
        self._require_open("wait")
        rank = self._check_rank("wait", "src_rank", src_rank)
        number = self._check_counter("wait", counter)
        value = integer("wait", "at_least", at_least, 0, (1 << 63) - 1)
        return self._run("wait", lambda: self._native.wait(rank, number, value), None, async_op)

    def counter(self, src_rank: int, counter: int) -> int:
        """Return the present value of a counter for a source.

        Raises
        ------
        InvalidArgument
        """
        self._require_open("counter")
        rank = self._check_rank("counter", "src_rank", src_rank)
        return int(self._native.counter(rank, self._check_counter("counter", counter)))

    def fence(self) -> None:
        """Wait until all writes and signals of this rank are complete on all ranks.

        Raises
        ------
        PeerLost, PeerTimeout
            A rank has ended, or does not accept the bytes within the timeout.
        """
        self._require_open("fence")
        self._settle()
        failure = self._native.fence()
        if failure is not None:
            self._fail("fence", failure)

    # -- the rest ---------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Return the numbers of rows and bytes of this rank per hop since the last call, and reset them.

        The result is a dict: rail and node, each {logical_rows, physical_rows, logical_bytes, physical_bytes} (logical:
        with one write per receiver; physical: on the links of the hop); links: by rank, the bytes that this rank wrote
        to it or read from it; calls.
        """
        self._require_open("stats")
        counted, links = self._native.take_counters()
        return {"rail": counted["rail"], "node": counted["node"], "links": links, "calls": counted["calls"]}

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._closed

    def close(self) -> None:
        """Release the memory. Local, may be called twice. No rank may use a verb afterwards.

        Memory that a tensor still refers to is released with the tensor.
        """
        if self._closed:
            return
        self._closed, self._fast = True, None
        if not self._member.after_call(self._release):
            self._release()

    def _release(self) -> None:
        self._settle()
        if not self._threads:
            self._native.release()

    def _agree(self, op: str, step: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Run step() on all ranks; return the common result. An error or a difference is raised on all ranks."""
        same = self.comm.collective.everywhere(op, step)
        self.comm.collective.require_equal(op, same)
        return dict(same[0])

    def _require_open(self, op: str) -> None:
        if self._closed:
            raise InvalidArgument(f"{op}: the domain is closed", op=op, rank=self.rank)
        self.comm.order.require_open(op)

    def _run(self, op: str, native: Callable[[], Any], keep: Any, async_op: bool) -> Pending[None] | None:
        """Make a native call, here or on the progress thread."""

        def work() -> None:
            failure = native()
            if failure is not None:
                self._fail(op, failure)

        if async_op:
            return Pending(self.comm, self._native.beside(work) if self._on_gpu else work, keep)
        self._settle()
        work()
        return None

    def _fail(self, op: str, failure: Any) -> NoReturn:
        if failure.code == "mismatch":
            raise ConfigMismatch(
                f"{op} on rank {self.rank}: rank {failure.peer} passed another root, ranks, shapes or offsets than its "
                "peers; expected the same requests in the same order on all ranks",
                op=op,
                phase=failure.phase,
                rank=self.rank,
                peer=failure.peer,
            )
        raise_failure(failure, op=op, rank=self.rank)

    def __enter__(self) -> Domain:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Domain(rank={self.rank}, size={self.size}, bytes={self.bytes}, taken={self._space.held})"
