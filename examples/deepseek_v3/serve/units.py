"""Units: sets of rank processes that the router calls. A call sends a message to each rank and waits for the answers.

Router and ranks exchange lines of JSON over a UNIX socket. A rank that fails sends its typed error before it ends. A
killed rank closes its connection. In both cases the unit has failed, and every later call raises the same error.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
from pathlib import Path

import moecomm
from moecomm import MoecommError, PeerLost, PeerTimeout

LONGEST = 1 << 24  # maximum bytes of a line
SOCKET = "router.sock"


class Unit:
    """A set of ranks, seen from the router.

    Parameters
    ----------
    name : str
        "prefill" or "decode".
    size : int
        Number of ranks.
    timeout : float
        Timeout of an answer, in seconds.
    """

    def __init__(self, name, size, timeout):
        self.name, self.size, self.timeout = name, size, timeout
        self.error = None  # the MoecommError that ended it
        self.processes = [None] * size  # multiprocessing.Process of each rank that this program has started
        self._lines = [None] * size  # (reader, writer)
        self._watch = []
        self._joined = asyncio.Event()
        self.failed = asyncio.Event()

    def join(self, rank, reader, writer):
        """Register the connection of a rank."""
        self._lines[rank] = reader, writer
        if all(self._lines):
            self._joined.set()

    async def ready(self):
        """Wait for all ranks.

        Raises
        ------
        PeerTimeout
            A rank has not connected in time.
        MoecommError
            A rank has failed.
        """
        waits = [asyncio.ensure_future(self._joined.wait()), asyncio.ensure_future(self.failed.wait())]
        await asyncio.wait(waits, timeout=self.timeout, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if not self._joined.is_set() and self.error is None:
            absent = [r for r, line in enumerate(self._lines) if line is None]
            self.fail(
                PeerTimeout(
                    f"{self.name} unit: ranks {absent} have not connected within {self.timeout} s; expected "
                    f"{self.size} ranks",
                    op="serve",
                    phase=self.name,
                    peer=absent[0],
                )
            )
        if self.error is not None:
            raise copy_of(self.error)

    async def call(self, messages):
        """Send one message to each rank; return the answers by rank.

        Raises
        ------
        MoecommError
            The unit has failed: PeerLost, PeerTimeout, or the error of a rank.
        """
        if self.error is not None:
            raise copy_of(self.error)
        for (_, writer), message in zip(self._lines, messages, strict=True):
            writer.write(json.dumps(message).encode() + b"\n")
        answers = [asyncio.ensure_future(self._answer(rank)) for rank in range(self.size)]
        try:
            done, late = await asyncio.wait(
                answers, timeout=self.timeout, return_when=asyncio.FIRST_EXCEPTION
            )
        except asyncio.CancelledError:
            for answer in answers:
                answer.cancel()
            raise
        broken = [a for a in done if a.exception() is not None]
        if broken or late:
            for answer in answers:
                answer.cancel()
            await asyncio.gather(*answers, return_exceptions=True)
            ranks = [r for r, a in enumerate(answers) if a in late]
            self.fail(broken[0].exception() if broken else self._late(ranks))
            raise copy_of(self.error)
        return [a.result() for a in answers]

    async def _answer(self, rank):
        try:
            line = await self._lines[rank][0].readline()
        except (ConnectionError, asyncio.LimitOverrunError, ValueError):
            line = b""
        if not line.endswith(b"\n"):
            raise PeerLost(
                f"{self.name} unit: the process of rank {rank} has ended{await self._how(rank)}; expected it to run "
                "until the router stops it",
                op="serve",
                phase=self.name,
                peer=rank,
            )
        answer = json.loads(line)
        if "error" in answer:
            raise error_from_json(answer["error"], self.name, rank)
        return answer

    def _late(self, ranks):
        return PeerTimeout(
            f"{self.name} unit: ranks {ranks} have not answered within {self.timeout} s",
            op="serve",
            phase=self.name,
            peer=ranks[0],
        )

    async def _how(self, rank):
        process = self.processes[rank]
        for _ in range(40):
            if process is None or process.exitcode is not None:
                break
            await asyncio.sleep(0.025)
        code = None if process is None else process.exitcode
        if code is None:
            return ""
        return f" (signal {signal.Signals(-code).name})" if code < 0 else f" (exit status {code})"

    def fail(self, error):
        """Mark the unit as failed, unless it has failed before. Later calls raise this error."""
        if self.error is None:
            self.error = error
            self.failed.set()

    async def watch(self):
        """Wait until a process of the unit has ended, with or without a call under way; return the error."""
        while self.error is None:
            for rank, process in enumerate(self.processes):
                if process is not None and process.exitcode is not None:
                    await asyncio.sleep(0.05)  # let a call under way report a more precise error
                    self.fail(
                        PeerLost(
                            f"{self.name} unit: the process of rank {rank} has ended{await self._how(rank)}",
                            op="serve",
                            phase=self.name,
                            peer=rank,
                        )
                    )
                    break
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.failed.wait(), 0.1)
        return self.error

    async def stop(self):
        """Stop all ranks and wait for their processes. Processes that do not end are killed."""
        for rank, line in enumerate(self._lines):
            if line is not None:
                with contextlib.suppress(ConnectionError, RuntimeError):
                    line[1].write(b'{"do": "stop"}\n')
                    line[1].close()
            self._lines[rank] = None
        loop = asyncio.get_running_loop()
        limit = 0.5 if self.error is not None else 10.0  # survivors of a failure may wait for lost peers
        for process in self.processes:
            if process is None:
                continue
            await loop.run_in_executor(None, process.join, limit)
            if process.is_alive():
                process.kill()
                await loop.run_in_executor(None, process.join, 10.0)


class Joining:
    """The socket to which ranks connect.

    Parameters
    ----------
    folder : Path
        Folder for the socket. Only this user may have access to it.
    units : list of Unit
    """

    def __init__(self, folder, units):
        self.path, self._units = str(Path(folder) / SOCKET), {unit.name: unit for unit in units}
        self._server = None

    async def open(self):
        """Listen."""
        self._server = await asyncio.start_unix_server(self._hello, self.path, limit=LONGEST)
        os.chmod(self.path, 0o600)

    async def _hello(self, reader, writer):
        try:
            message = json.loads(await reader.readline())
            unit, rank = self._units[message["unit"]], message["rank"]
        except (ValueError, KeyError, ConnectionError):
            writer.close()
            return
        if "error" in message:
            unit.fail(error_from_json(message["error"], unit.name, rank))
        else:
            unit.join(rank, reader, writer)

    async def close(self):
        """Stop listening."""
        if self._server is not None:
            self._server.close()


class RouterLine:
    """A rank's end of the connection to the router. Calls block."""

    def __init__(self, folder, unit, rank):
        self._folder, self._hello = folder, {"unit": unit, "rank": rank}
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(os.path.join(folder, SOCKET))
        self._file = self._socket.makefile("rwb")

    def hello(self):
        """Report that this rank is ready."""
        self.send(self._hello)

    def receive(self):
        """Wait for the next message. If the router is gone, remove its folder and return {"do": "stop"}."""
        line = self._file.readline(LONGEST)
        if line.endswith(b"\n"):
            return json.loads(line)
        shutil.rmtree(self._folder, ignore_errors=True)
        return {"do": "stop"}

    def send(self, message):
        """Send an answer."""
        self._file.write(json.dumps(message).encode() + b"\n")
        self._file.flush()

    def send_error(self, error, joined):
        """Report the error with which this rank ends."""
        with contextlib.suppress(OSError):
            self.send({**({} if joined else self._hello), "error": error_to_json(error)})


def copy_of(error):
    """Copy an error without its traceback, to raise it again."""
    fields = {name: getattr(error, name, None) for name in ("op", "phase", "rank", "peer")}
    return type(error)(str(error), **fields)


def error_to_json(error):
    """Convert an exception to types that JSON supports."""
    fields = {name: getattr(error, name, None) for name in ("op", "phase", "rank", "peer")}
    return {"type": type(error).__name__, "message": str(error), **fields}


def error_from_json(values, unit, rank):
    """Make the MoecommError that a rank has reported. Errors of other types become a MoecommError with their name."""
    kind = getattr(moecomm, values["type"], None)
    known = isinstance(kind, type) and issubclass(kind, MoecommError)
    text = values["message"] if known else f"{values['type']}: {values['message']}"
    return (kind if known else MoecommError)(
        f"{unit} unit, rank {rank}: {text}",
        op=values["op"] or "serve",
        phase=unit,
        rank=rank,
        peer=values["peer"],
    )
