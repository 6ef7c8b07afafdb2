"""Signals that ask a run to end: noticed between two updates, so that its state can be saved; in any case bounded.

SIGTERM and SIGINT are asked for once per update inside `between_updates`, and end everything else where it stands. A
rank whose launcher has died takes that as a SIGTERM. A thread of its own listens, since a rank that waits for others
inside a library never comes to Python's own handlers: a second signal, or too long a wait after the first, ends it.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from fastunlearn.utils.processes.relatives import launchers, open_process

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME_SECONDS = 1.0  # a group's signal and a launcher's are one wish
BOUND_SECONDS = 120.0  # from the first signal to the end, however long an update or a checkpoint takes
UNWIND_SECONDS = 10.0  # the same where nothing is saved
PEER_SECONDS = 3.0  # for the own words of a rank, once another has died
EXIT_SECONDS = 1.0  # of a process that ends
POLL_SECONDS = 1.0


class Stopped(BaseException):
    """The run ends since a signal asked for it. No ``Exception``: nothing that goes on after a failure may catch it."""

    def __init__(self, signum: int, saved: str | None = None) -> None:
        """``saved``: the name of the checkpoint that was written for it, if any."""
        super().__init__(signum)
        self.signum, self.saved = signum, saved

    @property
    def status(self) -> int:
        """The exit status, as a shell has it."""
        return 128 + self.signum


@dataclass
class _State:
    signum: int = 0
    since: float = 0.0
    deferred: bool = False
    peers: dict[int, str] = field(default_factory=dict)
    """Descriptors of processes without which this one cannot go on, and what they are called."""
    lost: str = ""
    """One of them that had died when this process failed."""


_state = _State()


def requested() -> int:
    """The number of the signal that asked for an end; 0: none did."""
    return _state.signum


@contextmanager
def between_updates() -> Iterator[None]:
    """Inside, a signal is not raised: the block asks `requested` itself."""
    _state.deferred = True
    try:
        yield
    finally:
        _state.deferred = False


@contextmanager
def listening() -> Iterator[None]:
    """Listen to signals as long as the block lasts. Outside the main thread, as in a test, it does nothing.

    Raises:
        Stopped: from inside the block, when a signal asked for an end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    _state.signum, _state.deferred = 0, False
    old = {number: signal.signal(number, _handle) for number in SIGNALS}
    old_wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    listener = _Listener(read)
    listener.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(old_wakeup)
        for number, handler in old.items():
            signal.signal(number, handler)
        listener.end(write)
        os.close(read)
        os.close(write)


@contextmanager
def bound_to(peers: dict[int, str]) -> Iterator[None]:
    """Inside, this process ends within seconds when one of the others does. ``peers``: process numbers, names."""
    opened = {open_process(pid): name for pid, name in peers.items()}
    _state.peers = {fd: name for fd, name in opened.items() if fd is not None}
    _state.lost = ""
    try:
        yield
    except Exception:
        _state.lost = lost_peer(EXIT_SECONDS)  # its connections close first
        raise
    finally:
        descriptors, _state.peers = list(_state.peers), {}
        for descriptor in descriptors:
            os.close(descriptor)


def lost_peer(seconds: float = 0.0) -> str:
    """The name of a process that has died without which this one cannot go on; "": they all live so long."""
    peers = _state.peers  # as they are now: the other thread may leave ``bound_to`` while this one waits
    if not peers:
        return _state.lost
    ended, _, _ = select.select(list(peers), [], [], seconds)
    return peers[ended[0]] if ended else ""


def _handle(signum: int, frame: Any) -> None:
    """In the main thread, when it comes to it."""
    _note(signum)
    if not _state.deferred:
        raise Stopped(_state.signum)


def _note(signum: int) -> None:
    if not _state.signum:
        _state.signum, _state.since = signum, time.monotonic()


class _Listener(threading.Thread):
    """Notices a signal, the end of a launcher and that of a peer at once, whatever the main thread does."""

    def __init__(self, wakeup: int) -> None:
        super().__init__(daemon=True)
        self._wakeup, self._ended = wakeup, threading.Event()
        known = launchers()
        self._parent = os.getppid() if known else 0
        self._launchers = [fd for fd in map(open_process, known) if fd is not None]
        self._peer_lost_at = 0.0

    def end(self, wakeup: int) -> None:
        """Stop listening. ``wakeup``: the other end of the pipe."""
        self._ended.set()
        with suppress(OSError):
            os.write(wakeup, b"\0")
        self.join()
        for descriptor in self._launchers:
            os.close(descriptor)

    def run(self) -> None:
        """Until it is ended, or ends this process."""
        while not self._ended.is_set():
            self._wait()
            now = time.monotonic()
            self._look_at_peers(now)
            bound = BOUND_SECONDS if _state.deferred else UNWIND_SECONDS
            if _state.signum and now - _state.since > bound and not self._ended.is_set():
                _leave(128 + _state.signum, f"stopped by force: nothing could be saved within {bound:.0f} s")

    def _wait(self) -> None:
        peers = [] if self._peer_lost_at else list(_state.peers)
        try:
            ready, _, _ = select.select([self._wakeup, *self._launchers, *peers], [], [], POLL_SECONDS)
        except (OSError, ValueError):  # the descriptor of a peer was closed meanwhile
            return
        if self._wakeup in ready:
            self._heard(os.read(self._wakeup, 64))
        gone = [fd for fd in self._launchers if fd in ready]
        if gone or (self._parent and os.getppid() != self._parent):
            self._parent = 0
            for descriptor in gone:
                self._launchers.remove(descriptor)
                os.close(descriptor)
            if not _state.signum:
                os.kill(os.getpid(), signal.SIGTERM)

    def _heard(self, numbers: bytes) -> None:
        for number in numbers:
            if number in SIGNALS:
                if _state.signum and time.monotonic() - _state.since > SAME_SECONDS:
                    _leave(128 + _state.signum, "")
                _note(number)

    def _look_at_peers(self, now: float) -> None:
        name = ""
        with suppress(OSError, ValueError):  # as above
            name = lost_peer() if _state.peers else ""
        if not name:
            self._peer_lost_at = 0.0
        elif not self._peer_lost_at:
            self._peer_lost_at = now
        elif now - self._peer_lost_at > PEER_SECONDS:
            _leave(1, f"error: {name} has died; this rank ends, too")


def _leave(status: int, words: str) -> None:
    """End this process at once."""
    if words:
        with suppress(OSError, ValueError):
            os.write(2, f"{words}\n".encode())
    os._exit(status)
