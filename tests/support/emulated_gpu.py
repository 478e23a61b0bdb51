"""An emulated GPU: the cuda world's extension on emulated memory, streams and lanes.

It also replaces the part of torch.cuda that moecomm uses. Its tensors are on the CPU. The rest is the real cuda
world: its Python code, its runtime and the source of its kernels.

A kernel runs during its launch, each lane as a fiber of the launching rank's thread. A stream is therefore always
idle when Python code runs, unless it is captured. The emulation has neither a GPU's memory order nor concurrent
streams.

python tests/support/emulated_gpu.py      # builds it, into build/emulated

With EMULATED_KERNELS=ptx in the environment, tools/ptx runs the kernels as compiled by nvcc: EMULATED_SEED=n selects
a random schedule, EMULATED_ORDER=1 the checker of memory order (docs/ptx.md).
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
    """Return the path of the extension; compile it if a source is newer."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    library = FOLDER / ("cuda_ptx.so" if PTX else "cuda.so")
    cython = translate()
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
    for source in (*cython, *SOURCES, *(() if PTX else TEXT)):
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


def translate():
    """The C++ that Cython makes of the extension and of its parts."""
    written = [p for p in (ROOT / "moecomm/_native").rglob("*") if p.suffix in (".pyx", ".pxd")]
    modules = ["moecomm/_native/cuda.pyx", *sources.PARTS["moecomm._native.cuda"]]
    made = {path: FOLDER / f"{path.removesuffix('.pyx').replace('/', '.')}.cpp" for path in modules}
    for path, cpp in made.items():
        if not is_fresh(cpp, written):
            name = ["--module-name", cpp.name.removesuffix(".cpp")]
            command = [sys.executable, "-m", "cython", "-3", "--cplus", *name, path, "-o", str(cpp)]
            subprocess.run(command, check=True, cwd=ROOT)
    return list(made.values())


def ptx_build():
    """Load tools/ptx/build.py."""
    sys.path.insert(0, str(ROOT / "tools"))
    return importlib.import_module("ptx.build")


def is_fresh(made, sources):
    """Tell whether a file exists and is newer than its sources."""
    return made.exists() and all(s.exists() and s.stat().st_mtime <= made.stat().st_mtime for s in sources)


class Event:
    """An event of the emulated GPU: it is complete when it is recorded."""

    def __init__(self, enable_timing=False):
        self.at = None

    def record(self, stream=None):
        self.at = time.perf_counter()

    def query(self):
        return True

    def synchronize(self):
        """Do nothing: the event is complete."""

    def elapsed_time(self, later):
        return 1e3 * (later.at - self.at)


class Stream:
    """A stream of the emulated GPU."""

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
        """Do nothing: the stream is idle."""

    def synchronize(self):
        """Do nothing: the stream is idle."""


class Gpu:
    """One emulated GPU. `pending` counts the captured launches."""

    def __init__(self, library):
        self.native = load(library)
        self.calls = ctypes.CDLL(str(library))
        for name in ("emulated_stream", "emulated_end_capture"):
            getattr(self.calls, name).restype = ctypes.c_void_p
        self.calls.emulated_begin_capture.argtypes = [ctypes.c_void_p, ctypes.c_ulonglong]
        self.calls.emulated_order.argtypes = [ctypes.c_ulonglong]
        for name in ("emulated_end_capture", "emulated_replay", "emulated_nodes"):
            getattr(self.calls, name).argtypes = [ctypes.c_void_p]
        self.calls.emulated_nodes.restype = ctypes.c_ulonglong
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
        """Run blocks, warps and lanes in an order chosen by the seed."""
        self.calls.emulated_order(seed << 32 | 1)
        try:
            yield
        finally:
            self.calls.emulated_order(0)

    @contextlib.contextmanager
    def captured_elsewhere(self):
        """Capture in the default mode in another thread; yields a function that returns the number of refused calls."""
        self.calls.emulated_refused_calls()
        self.calls.emulated_global_captures(1)
        try:
            yield self.calls.emulated_refused_calls
        finally:
            self.calls.emulated_global_captures(-1)

    def damage(self, passes):
        """Make one of the following bulk stores of this thread's kernels write a wrong bit."""
        self.calls.emulated_damage(passes)

    @contextlib.contextmanager
    def capture(self):
        """Record the launches on the current stream; .replay() of the graph runs them, .nodes is their number."""
        stream, graph = self.current_stream(), SimpleNamespace()
        self.captures += 1
        self.calls.emulated_begin_capture(stream.cuda_stream, self.captures)
        stream.capturing = True
        try:
            yield graph
        finally:
            stream.capturing = False
            kept = self.calls.emulated_end_capture(stream.cuda_stream)
            graph.replay, graph.nodes = (
                lambda: self.calls.emulated_replay(kept),
                self.calls.emulated_nodes(kept),
            )


@functools.cache
def the_gpu():
    """Return the emulated GPU, which is built and loaded once per process."""
    return Gpu(build())


def load(library):
    """Load the extension as a separate module."""
    spec = importlib.util.spec_from_file_location("moecomm._native.cuda", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def memory_of(area):
    """Like cuda.memory_of, for memory on the CPU."""
    described = area.__cuda_array_interface__
    kind, (count,) = {"|u1": ctypes.c_uint8, "<i8": ctypes.c_int64}[described["typestr"]], described["shape"]
    if not count:
        return torch.empty(0, dtype=torch.uint8)
    array = (kind * count).from_address(described["data"][0])
    array.kept = area  # keeps the area as long as a tensor uses the array
    return torch.frombuffer(array, dtype={ctypes.c_uint8: torch.uint8, ctypes.c_int64: torch.int64}[kind])


NO_GPU = cuda.why_not()
REASON = f"needs a GPU: {NO_GPU}"


@pytest.fixture(params=["real", "emulated"])
def gpu(request, monkeypatch):
    """The emulated GPU, or None, for tests that run with both."""
    if request.param == "real" and NO_GPU is not None:
        pytest.skip(REASON)
    return install(monkeypatch) if request.param == "emulated" else None


@pytest.fixture
def emulated(monkeypatch):
    """The emulated GPU, for tests that depend on the emulation."""
    return install(monkeypatch)


@pytest.fixture(params=["cpu", "emulated"])
def either_world(request, monkeypatch):
    """Makes run_local of a CPU test also run the cuda world."""
    if request.param == "emulated":
        install(monkeypatch)
        monkeypatch.setattr(moecomm, "run_local", functools.partial(moecomm.run_local, device="cuda:0"))
    return request.param


real_gpu = pytest.mark.skipif(NO_GPU is not None, reason=REASON)  # for tests that the emulation cannot run


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
    """Install the emulated GPU with a pytest.MonkeyPatch.

    `spread` chooses plans with few warps, since each lane is a fiber.
    """
    gpu = the_gpu()
    construct = Communicator.__init__

    def on_the_cpu(comm, *args, **more):
        construct(comm, *args, **more)
        if comm.gpu is not None:
            comm.device = torch.device("cpu")  # the device of its tensors

    patch.setattr(Communicator, "__init__", on_the_cpu)
    patch.setattr(cuda, "why_not", lambda: None)
    patch.setattr(cuda, "native", lambda: gpu.native)
    patch.setattr(cuda, "memory_of", memory_of)
    patch.setattr(tuning, "_override", spread)
    patch.setattr(tuning, "domain_plan", lambda hardware, num_sms: tuning.Plan(1, 3, 3, 0, 512))
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
