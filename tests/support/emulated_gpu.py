"""A GPU that is not there: the cuda world's extension over emulated memory, streams and lanes, and the part
of torch.cuda that moecomm uses. Its tensors lie on the CPU; everything else is the cuda world: its Python,
its runtime, its kernels' own text.

A kernel runs while it is launched, every lane a fiber of the launching rank's thread, so a stream is at its
end whenever Python has it, unless it is captured. What only a GPU does (the order of memory, streams that
run by themselves) is not here.

    python tests/support/emulated_gpu.py      builds it, into build/emulated

With EMULATED_KERNELS=ptx in the environment the kernels are what nvcc has made of that text, run by
tools/ptx: with EMULATED_SEED=n under a random schedule, with EMULATED_ORDER=1 under its checker of memory
order (docs/ptx.md).
"""

import contextlib
import ctypes
import functools
import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import moecomm
from moecomm import cuda, tuning
from moecomm.communicator import Communicator

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import sources  # noqa: E402

FOLDER = ROOT / "build/emulated"
SOURCES = (
    *(ROOT / source for source in (*sources.CUDA_HOST, sources.NCCL_HOST[1])),
    ROOT / "tests/cpp/emulated/fibers/streams.cpp",
)
TEXT = (
    *(ROOT / source for source in sources.FIBERS),
    ROOT / "tests/cpp/emulated/fibers/gpu.cpp",
)  # the kernels
PTX = os.environ.get("EMULATED_KERNELS") == "ptx"
INCLUDES = (
    "-iquote",
    "tests/cpp/emulated/fibers",
    "-iquote",
    "tests/cpp/emulated",
    "-Itests/cpp/emulated",
    "-Icsrc",
)


def build():
    """The path of the extension, compiled where something is newer than it."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    cython, library = FOLDER / "cuda.cpp", FOLDER / ("cuda_ptx.so" if PTX else "cuda.so")
    if not is_fresh(
        cython, [p for p in (ROOT / "moecomm/_native").iterdir() if p.suffix in (".pyx", ".pxi", ".pxd")]
    ):
        subprocess.run(
            [
                sys.executable,
                "-m",
                "cython",
                "-3",
                "--cplus",
                "--module-name",
                "moecomm._native.cuda",
                "moecomm/_native/cuda.pyx",
                "-o",
                str(cython),
            ],
            check=True,
            cwd=ROOT,
        )
    ucx = Path(importlib.util.find_spec("libucx").origin).parent
    flags = [
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-fvisibility=hidden",
        "-ffp-contract=off",
        "-w",
        *INCLUDES,
        f"-I{ucx}/include",
        f"-I{sysconfig.get_path('include')}",
    ]
    objects, running = [], []
    for source in (cython, *SOURCES, *(() if PTX else TEXT)):
        objects.append(FOLDER / f"{source.parent.name}_{source.stem}.o")
        made = objects[-1].with_suffix(".d")
        needs = made.read_text().replace("\\\n", " ").split(":", 1)[1].split() if made.exists() else []
        if not needs or not is_fresh(objects[-1], [ROOT / name for name in needs]):
            command = [
                *shlex.split(os.environ.get("CXX", "c++")),
                *flags,
                "-MMD",
                "-MF",
                str(made),
                "-c",
                str(source),
                "-o",
                str(objects[-1]),
            ]
            running.append(subprocess.Popen(command, cwd=ROOT))
    if PTX:
        objects += ptx_build().objects()
    assert not any(p.wait() for p in running)
    if not is_fresh(library, objects):
        subprocess.run(
            [
                *shlex.split(os.environ.get("CXX", "c++")),
                "-shared",
                *map(str, objects),
                "-o",
                str(library),
                "-pthread",
                "-lrt",
            ],
            check=True,
        )
    return library


def ptx_build():
    """tools/ptx/build.py."""
    sys.path.insert(0, str(ROOT / "tools"))
    return importlib.import_module("ptx.build")


def is_fresh(made, sources):
    """Whether a file is there and none of its sources is newer."""
    return made.exists() and all(s.exists() and s.stat().st_mtime <= made.stat().st_mtime for s in sources)


class Event:
    """Of the emulated GPU: happens when it is recorded."""

    def __init__(self, enable_timing=False):
        self.at = None

    def record(self, stream=None):
        self.at = time.perf_counter()

    def query(self):
        return True

    def synchronize(self):
        """Nothing to wait for."""

    def elapsed_time(self, later):
        return 1e3 * (later.at - self.at)


class Stream:
    """Of the emulated GPU."""

    def __init__(self, gpu, priority=0):
        self.gpu, self.cuda_stream, self.capturing = gpu, gpu.calls.emulated_stream(), False
        self.priority, self.waited = priority, []

    def record_event(self):
        event = Event()
        event.record()
        return event

    def wait_event(self, event):
        assert event.at is not None
        self.waited.append(event)

    def wait_stream(self, other):
        """It is at its end."""

    def synchronize(self):
        """It is at its end."""


class Gpu:
    """One of them. `pending` counts what has been captured."""

    def __init__(self, library):
        self.native = load(library)
        self.calls = ctypes.CDLL(str(library))
        for name in ("emulated_stream", "emulated_end_capture"):
            getattr(self.calls, name).restype = ctypes.c_void_p
        self.calls.emulated_begin_capture.argtypes = [ctypes.c_void_p, ctypes.c_ulonglong]
        self.calls.emulated_order.argtypes = [ctypes.c_ulonglong]
        self.calls.emulated_end_capture.argtypes = self.calls.emulated_replay.argtypes = [ctypes.c_void_p]
        self.local, self.captures = threading.local(), 0
        if PTX:
            self.calls.ptx_load.restype = ctypes.c_char_p
            for program in ptx_build().programs():
                wrong = self.calls.ptx_load(str(program).encode())
                assert wrong is None, wrong.decode()
            self.calls.ptx_settings(ctypes.c_uint64(int(os.environ.get("EMULATED_SEED", "0"))), 132)
            self.calls.ptx_check(os.environ.get("EMULATED_ORDER") == "1")

    def current_stream(self, device=None):
        if not hasattr(self.local, "stream"):
            self.local.stream = Stream(self)
        return self.local.stream

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.local.stream = self.current_stream(), stream
        try:
            yield stream
        finally:
            self.local.stream = before

    @contextlib.contextmanager
    def any_order(self, seed):
        """Blocks, warps and lanes run in an order that the seed chooses."""
        self.calls.emulated_order(seed << 32 | 1)
        try:
            yield
        finally:
            self.calls.emulated_order(0)

    @contextlib.contextmanager
    def captured_elsewhere(self):
        """While another thread captures in the default mode: gives what says how many calls were refused for it."""
        self.calls.emulated_refused_calls()
        self.calls.emulated_global_captures(1)
        try:
            yield self.calls.emulated_refused_calls
        finally:
            self.calls.emulated_global_captures(-1)

    def damage(self, passes):
        """Of the bulk stores that this thread's kernels make from here on, one writes a wrong bit."""
        self.calls.emulated_damage(passes)

    @contextlib.contextmanager
    def capture(self):
        """Keeps what is launched on the current stream; the graph's .replay() runs it."""
        stream, graph = self.current_stream(), SimpleNamespace()
        self.captures += 1
        self.calls.emulated_begin_capture(stream.cuda_stream, self.captures)
        stream.capturing = True
        try:
            yield graph
        finally:
            stream.capturing = False
            kept = self.calls.emulated_end_capture(stream.cuda_stream)
            graph.replay = lambda: self.calls.emulated_replay(kept)


@functools.cache
def the_gpu():
    """Built and loaded once in a process."""
    return Gpu(build())


def load(library):
    """The extension as a module of its own."""
    spec = importlib.util.spec_from_file_location("moecomm._native.cuda", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def memory_of(area):
    """As cuda.memory_of, of memory that lies on the CPU."""
    described = area.__cuda_array_interface__
    kind, (count,) = {"|u1": ctypes.c_uint8, "<i8": ctypes.c_int64}[described["typestr"]], described["shape"]
    if not count:
        return torch.empty(0, dtype=torch.uint8)
    array = (kind * count).from_address(described["data"][0])
    array.kept = area  # as long as a tensor has the array
    return torch.frombuffer(array, dtype={ctypes.c_uint8: torch.uint8, ctypes.c_int64: torch.int64}[kind])


NO_GPU = cuda.why_not()
REASON = f"needs a GPU: {NO_GPU}"


@pytest.fixture(params=["real", "emulated"])
def gpu(request, monkeypatch):
    """For tests that run on either: the emulated one, or None."""
    if request.param == "real" and NO_GPU is not None:
        pytest.skip(REASON)
    return install(monkeypatch) if request.param == "emulated" else None


@pytest.fixture
def emulated(monkeypatch):
    """For tests that count on what only the emulated one does."""
    return install(monkeypatch)


@pytest.fixture(params=["cpu", "emulated"])
def either_world(request, monkeypatch):
    """For tests of the cpu world whose run_local is to mean the cuda world too."""
    if request.param == "emulated":
        install(monkeypatch)
        monkeypatch.setattr(moecomm, "run_local", functools.partial(moecomm.run_local, device="cuda:0"))
    return request.param


real_gpu = pytest.mark.skipif(NO_GPU is not None, reason=REASON)  # for tests that it cannot run


def install(
    patch,
    spread=lambda hardware, traffic: tuning.replace(
        tuning.choose_plan(hardware, traffic, 2),
        num_sms=1,
        warps=3,
        channels=2,
        senders=min(1, traffic.nodes - 1),
    ),
):
    """Put the GPU in place, by a pytest.MonkeyPatch; `spread` chooses plans: few warps, since all of them
    are fibers.
    """
    gpu = the_gpu()
    construct = Communicator.__init__

    def on_the_cpu(comm, *args, **more):
        construct(comm, *args, **more)
        if comm._gpu is not None:
            comm.device = torch.device("cpu")  # where its tensors lie

    patch.setattr(Communicator, "__init__", on_the_cpu)
    patch.setattr(cuda, "why_not", lambda: None)
    patch.setattr(cuda, "native", lambda: gpu.native)
    patch.setattr(cuda, "memory_of", memory_of)
    patch.setattr(tuning, "_override", spread)
    patch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    for name, value in dict(
        current_stream=gpu.current_stream,
        stream=gpu.stream,
        Stream=lambda device=None, priority=0: Stream(gpu, priority),
        Event=Event,
        device=lambda device: contextlib.nullcontext(),
        current_device=lambda: 0,
        device_count=lambda: 1,
        get_device_name=lambda device=None: "an emulated GPU",
        synchronize=lambda device=None: None,
        get_device_properties=lambda device=None: SimpleNamespace(uuid="emulated"),
        is_current_stream_capturing=lambda: gpu.current_stream().capturing,
    ).items():
        patch.setattr(torch.cuda, name, value)
    return gpu


if __name__ == "__main__":
    print(build())
