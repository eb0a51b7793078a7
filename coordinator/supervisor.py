# SPDX-License-Identifier: Apache-2.0
"""Keeps the processes of a deployment running, and leaves none behind.

Each child leads a process group of its own, and dies with the supervisor even if that is killed
(PR_SET_PDEATHSIG). What a child detached from its group comes back to the supervisor, which is the
reaper of all its descendants, and is ended with the rest. What the children print goes through a
pipe into files that are turned over, so that no log grows without end. Linux only.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from coordinator.errors import SupervisorError

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
_TICK_S: Final = 0.1
_PIPE_BYTES: Final = 64 << 10
_TAIL_LINES: Final = 5  # of a log, quoted when its process is given up


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A process to keep running. Raises: SupervisorError for what cannot be a name or a command."""

    name: str  # also of its log file
    argv: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)  # on top of the supervisor's
    folder: Path | None = None  # to run in
    stop_s: float = 10.0  # from SIGTERM to SIGKILL

    def __post_init__(self) -> None:
        if not self.name or not self.name.replace("-", "").isalnum() or not self.name.isascii():
            raise SupervisorError(f"expected a name of letters, digits and -, found {self.name!r}")
        if not self.argv:
            raise SupervisorError(f"{self.name}: expected a command, found none")


@dataclass(frozen=True, slots=True, kw_only=True)
class Restarts:
    """When a process that ended is started again, and when it is given up. Times in seconds."""

    first_pause_s: float = 0.5
    growth: float = 2.0  # of the pause, from one restart to the next
    longest_pause_s: float = 30.0
    jitter: float = 0.5  # a pause is up to this part shorter, so that not all come back at once
    healthy_s: float = 60.0  # a process that lived so long begins with the first pause again
    most: int = 8  # restarts in `within_s`
    within_s: float = 300.0

    def pause_s(self, number: int, rng: random.Random) -> float:
        """Before the restart with this number; 0 is the first."""
        pause: float = min(self.longest_pause_s, self.first_pause_s * self.growth**number)
        return pause * (1.0 - self.jitter * rng.random())


@dataclass(frozen=True, slots=True, kw_only=True)
class LogFiles:
    """How much is kept of what each process prints."""

    max_bytes: int = 10 << 20  # of one file
    kept: int = 3  # older files: NAME.log.1, ...


class Supervisor:
    """Runs commands until it is told to stop.

    `folder` gets `NAME.log` of each process and `processes.json`, which says what is running.
    """

    def __init__(
        self,
        commands: Sequence[Command],
        folder: Path,
        *,
        restarts: Restarts | None = None,
        logs: LogFiles | None = None,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        names = [command.name for command in commands]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise SupervisorError(f"expected each name once, found {', '.join(twice)} twice")
        self._folder = folder
        self._restarts = restarts or Restarts()
        self._rng = rng or random.Random()
        self._clock = clock
        self._children = [
            _Child(command, _Log(folder / f"{command.name}.log", logs or LogFiles()))
            for command in commands
        ]
        self._pipes = selectors.DefaultSelector()
        self._stop = False

    def run(self) -> None:
        """Until SIGTERM or SIGINT, or `stop`; from the main thread of a process without other
        children, for all that this process has are ended with it.

        Raises: SupervisorError when a process cannot be started or dies too often; the others are
        stopped before.
        """
        _make_reaper()
        previous = {
            number: signal.signal(number, lambda *_: self.stop())
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for child in self._children:
                self._start(child)
            while not self._stop:
                self._read_pipes(_TICK_S)
                self._look_after()
        except OSError as error:
            raise SupervisorError(f"{self._folder}: cannot be used: {error.strerror}") from error
        finally:
            self._end_all()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def stop(self) -> None:
        """Ends `run` soon. May be called from a signal handler or another thread."""
        self._stop = True

    def _look_after(self) -> None:
        now = self._clock()
        for child in self._children:
            if child.process is not None and child.process.poll() is not None:
                self._ended(child, now)
            elif child.process is None and now >= child.start_at:
                self._start(child)
        _reap_strangers({child.process.pid for child in self._children if child.process})

    def _start(self, child: _Child) -> None:
        command = child.command
        try:
            child.process = subprocess.Popen(
                list(command.argv),
                cwd=command.folder,
                env={**os.environ, **command.environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                process_group=0,
                # Of this thread's end in truth, so `run` belongs into the main one.
                preexec_fn=_DieWithParent(os.getpid()),
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise SupervisorError(
                f"{command.name}: cannot be started: {error}; the command is {command.argv[0]}"
            ) from None
        child.started = self._clock()
        pipe = child.process.stdout
        assert pipe is not None  # PIPE was asked for
        os.set_blocking(pipe.fileno(), False)
        self._pipes.register(pipe, selectors.EVENT_READ, child)
        child.log.note(f"started, process {child.process.pid}")
        self._write_state()

    def _ended(self, child: _Child, now: float) -> None:
        process, child.process = child.process, None
        assert process is not None
        _signal_group(process.pid, signal.SIGKILL)  # what it started is of no use without it
        self._read_pipes(0)
        child.log.note(f"ended: {_how(process.returncode)}")
        if now - child.started >= self._restarts.healthy_s:
            child.failures = 0
        while child.deaths and now - child.deaths[0] > self._restarts.within_s:
            child.deaths.popleft()
        if len(child.deaths) >= self._restarts.most:
            raise SupervisorError(
                f"{child.command.name}: given up: it ended {len(child.deaths) + 1} times in "
                f"{now - child.deaths[0]:.0f} s, last with {_how(process.returncode)}. Its last "
                f"lines, of {child.log.path}:\n{child.log.tail(_TAIL_LINES)}"
            )
        child.deaths.append(now)
        child.start_at = now + self._restarts.pause_s(child.failures, self._rng)
        child.failures += 1
        child.restarts += 1
        self._write_state()

    def _read_pipes(self, timeout_s: float) -> None:
        for key, _ in self._pipes.select(timeout_s):
            pipe, child = key.fileobj, key.data
            assert not isinstance(pipe, int)
            try:
                data = os.read(pipe.fileno(), _PIPE_BYTES)
            except BlockingIOError:
                continue
            if data:
                child.log.write(data)
            else:
                self._pipes.unregister(pipe)
                pipe.close()  # type: ignore[attr-defined]

    def _end_all(self) -> None:
        """SIGTERM to each, in the reverse of the order of starting; SIGKILL to who is slow."""
        for child in reversed(self._children):
            if child.process is not None:
                with contextlib.suppress(ProcessLookupError):
                    child.process.terminate()
                end = time.monotonic() + child.command.stop_s
                while child.process.poll() is None and time.monotonic() < end:
                    self._read_pipes(_TICK_S / 5)
                if child.process.poll() is None:
                    child.log.note(f"did not stop in {child.command.stop_s:g} s, and is killed")
                _signal_group(child.process.pid, signal.SIGKILL)
                child.process.wait()
                child.log.note(f"stopped: {_how(child.process.returncode)}")
                child.process = None
        _kill_descendants()
        with contextlib.suppress(OSError):
            self._read_pipes(0)
        for key in list(self._pipes.get_map().values()):
            self._pipes.unregister(key.fileobj)
            key.fileobj.close()  # type: ignore[union-attr]
        self._pipes.close()
        for child in self._children:
            child.log.close()
        with contextlib.suppress(OSError):
            self._write_state()

    def _write_state(self) -> None:
        state = {
            child.command.name: {
                "pid": child.process.pid if child.process else None,
                "restarts": child.restarts,
            }
            for child in self._children
        }
        path = self._folder / "processes.json"
        new = path.with_suffix(".new")
        new.write_text(json.dumps({"supervisor": os.getpid(), "processes": state}) + "\n")
        new.replace(path)


@dataclass(slots=True)
class _Child:
    command: Command
    log: _Log
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    start_at: float = 0.0
    failures: int = 0  # in a row, which the next pause grows with
    restarts: int = 0
    deaths: deque[float] = field(default_factory=deque)


class _Log:
    """A file that is turned over when it is full."""

    def __init__(self, path: Path, files: LogFiles) -> None:
        self.path = path
        self._files = files
        self._descriptor: int | None = None
        self._size = 0

    def write(self, data: bytes) -> None:
        """A full disk loses lines of a log; it must not end what they are about."""
        with contextlib.suppress(OSError):
            if self._size and self._size + len(data) > self._files.max_bytes:
                self.close()
                self._turn_over()
            if self._descriptor is None:
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                self._descriptor = os.open(self.path, flags, 0o600)
                self._size = os.fstat(self._descriptor).st_size
            self._size += os.write(self._descriptor, data)

    def note(self, text: str) -> None:
        """A line of the supervisor's own."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.write(f"{stamp} supervisor: {text}\n".encode())

    def tail(self, lines: int) -> str:
        """The last lines that were written."""
        try:
            with open(self.path, "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _PIPE_BYTES))
                return "\n".join(file.read().decode("utf-8", "replace").splitlines()[-lines:])
        except OSError as error:
            return f"(cannot be read: {error.strerror})"

    def close(self) -> None:
        """Closes the file; a later line opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _turn_over(self) -> None:
        older = [
            self.path.with_name(f"{self.path.name}.{number}")
            for number in range(self._files.kept, 0, -1)
        ]
        for old, new in zip(older, [*older[1:], self.path], strict=True):
            if new.exists():
                new.replace(old)
        self.path.unlink(missing_ok=True)  # still there if no older file is kept


class _DieWithParent:
    """Run in a child before its program: SIGKILL for it when the supervisor ends."""

    def __init__(self, parent: int) -> None:
        self._parent = parent
        # Loaded here: between fork and exec nothing should be imported or allocated.
        self._prctl = _libc().prctl

    def __call__(self) -> None:
        self._prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != self._parent:  # it died before the call
            os._exit(1)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _make_reaper() -> None:
    """Descendants that lose their parent become children of this process, not of init."""
    if sys.platform != "linux" or _libc().prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise SupervisorError("expected Linux 3.4 or newer, which keeps a process's descendants")


def _children_of(parent: int) -> list[int]:
    """From /proc: processes may have come back that were never started here."""
    found = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdecimal():
            continue
        with contextlib.suppress(OSError):
            status = Path(entry.path, "stat").read_text(encoding="utf-8", errors="replace")
            # The name before the last ")" may hold anything, blanks included.
            if int(status.rpartition(")")[2].split()[1]) == parent:
                found.append(int(entry.name))
    return found


def _reap_strangers(known: set[int]) -> None:
    """Takes the exit of orphans that came back; children of ours are left to their Popen."""
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None or ended.si_pid in known:
            return
        with contextlib.suppress(ChildProcessError):
            os.waitpid(ended.si_pid, os.WNOHANG)


def _kill_descendants() -> None:
    """All that came back, and what comes back when they end."""
    end = time.monotonic() + 5.0
    while (left := _children_of(os.getpid())) and time.monotonic() < end:
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _how(code: int) -> str:
    """An exit status in words."""
    if code >= 0:
        return f"exit code {code}"
    return f"signal {signal.Signals(-code).name}"
