"""
Early ends of a run: signals, a limit of time, and dry runs. A run ends after an optimizer step, with a checkpoint.

Queues and clouds announce with SIGTERM or SIGUSR1 that they will stop a process soon.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any


SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
MAX_TIME = re.compile(r"(\d+):([0-5]\d):([0-5]\d)|(\d+(?:\.\d+)?)")
# Durations that are not known yet, and what else a process does until it has ended, as shares of the time limit and
# seconds at most.
UNKNOWN_CHECKPOINT, MARGIN = (0.05, 300.0), (0.05, 30.0)
RECENT_STEPS = 20
# Within so many seconds, the same signal again is the same one: queues send it to all processes of a job, and launchers
# pass on what they got.
REPEATED_SECONDS = 2.0


def parse_max_time(value: str) -> float:
    """
    Converts a duration, "HH:MM:SS" or a number of minutes, to seconds. Raises a `ValueError` for another format, and
    for 0.
    """
    match = MAX_TIME.fullmatch(value.strip())
    seconds = 0.0
    if match is not None and match[4] is not None:
        seconds = 60 * float(match[4])
    elif match is not None:
        seconds = 3600.0 * int(match[1]) + 60 * int(match[2]) + int(match[3])
    if seconds == 0:
        raise ValueError(f"`max_time` is {value!r}; it must be a duration, HH:MM:SS or a number of minutes.")
    return seconds


class Interruption:
    """
    Remembers that this process was asked to end, until all processes agree on it after an optimizer step.

    Args:
        max_time (`str`, *optional*): See `parse_max_time`.
        started (`float`, *optional*): When that time began, by `time.monotonic`. None: now.
        dry_run (`bool`, defaults to `False`): End after one step.

    Attributes:
        reason (`str`, *optional*): Why the run ends, once the processes have agreed on it.
    """

    def __init__(self, max_time: str | None = None, started: float | None = None, dry_run: bool = False):
        self.max_seconds = None if max_time is None else parse_max_time(max_time)
        self.started = time.monotonic() if started is None else started
        self.dry_run = dry_run
        self.received: signal.Signals | None = None
        self._received_at = 0.0
        self.reason: str | None = None
        self.longest: dict[str, float] = {}  # seconds, of a checkpoint and of a validation
        self.steps: deque[float] = deque(maxlen=RECENT_STEPS)  # seconds
        self._handlers: dict[signal.Signals, Any] = {}
        self._spent: dict[str, float] = {}  # seconds since the last step, as in `longest`
        self._clock = time.monotonic()

    # Signals

    def install(self) -> None:
        """
        Begins to remember signals, if this is the main thread of the process: no other one gets them. The first step
        begins.
        """
        self._clock = time.monotonic()
        if not self._handlers and threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def uninstall(self) -> None:
        """Handles signals as before `install`."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if number == self.received and time.monotonic() - self._received_at < REPEATED_SECONDS:
                return
            os._exit(128 + number)  # the convention of shells
        self.received, self._received_at = signal.Signals(number), time.monotonic()
        # Neither `print` nor logging may be called within itself, which is where the signal may have come.
        os.write(2, f"\n{self.received.name}: leaving after this step. A second signal ends at once.\n".encode())

    # Time

    @contextmanager
    def measuring(self, kind: str) -> Iterator[None]:
        """Measures a checkpoint or a validation, in a `with` block; a validation may have several, after one step."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._clock = time.monotonic()
            self._spent[kind] = self._spent.get(kind, 0.0) + self._clock - start
            self.longest[kind] = max(self.longest.get(kind, 0.0), self._spent[kind])

    def count_step(self) -> None:
        """Measures an optimizer step, at its end."""
        now = time.monotonic()
        self.steps.append(now - self._clock)
        self._clock, self._spent = now, {}

    @property
    def is_time_up(self) -> bool:
        """Whether the time might not suffice for another step, a validation and a checkpoint."""
        if self.max_seconds is None:
            return False
        unknown, margin = (min(share * self.max_seconds, most) for share, most in (UNKNOWN_CHECKPOINT, MARGIN))
        needed = 2 * max(self.steps, default=0.0) + self.longest.get("checkpoint", unknown) + margin
        needed += self.longest.get("validation", 0.0)
        return time.monotonic() - self.started + needed >= self.max_seconds

    # Agreement

    @property
    def wishes(self) -> list[bool]:
        """Why this process wants to end: for a signal, for lack of time."""
        return [self.received is not None, self.is_time_up]

    def decide(self, wishes: Sequence[bool]) -> None:
        """Ends the run for the `wishes` of all processes."""
        signalled, is_time_up = wishes
        if self.dry_run:
            self.reason = "`--dry_run`"
        elif signalled:
            self.reason = self.received.name if self.received is not None else "a signal to another process"
        elif is_time_up:
            self.reason = "`--max_time`"


def keep_to_parent(worker: int = 0) -> None:
    """
    Makes a worker process of a data loader end for its parent only. A queue signals every process of a job, but the
    parent needs its workers until the running step has ended. For `worker_init_fn` of `DataLoader`.
    """
    parent = multiprocessing.parent_process()
    if parent is None or not hasattr(signal, "sigwaitinfo"):  # which not every system has
        return
    # Blocked in all threads, so that the one below can see who sent a signal.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def wait() -> None:
        while True:
            if signal.sigwaitinfo(SIGNALS).si_pid == parent.pid:
                os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
