"""
Training runs that are interrupted and resumed until they end, and their comparison with an unbroken one.

The processes are real: each start of a run is a process (or several) of its own, forked from a server that has done the
imports, and is ended by the signal that would end it in the field.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


TESTS = Path(__file__).resolve().parents[1]
sys.path += [str(TESTS), str(TESTS / "training"), str(TESTS / "schedulers")]

from processes import start_script  # noqa: E402
from runs import assert_same_checkpoint, assert_same_state, flags, read_metrics  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from diffusers_adm.training import find_latest_checkpoint  # noqa: E402


# A run of these sizes takes a few seconds; one that takes this long hangs.
HANGS_AFTER = 180
# Measured, not computed.
TIMINGS = ("images_per_second", "tflops_per_second", "mfu")


@dataclass
class Setup:
    """A kind of run: its script, its arguments without `output_dir`, and its number of processes."""

    name: str
    arguments: dict
    script: str = "train_adm"
    num_processes: int = 1


class Attempt:
    """One start of a run: its processes, as many as the set-up has, each in a process group of its own."""

    def __init__(self, setup: Setup, folder: Path, prelude: Callable[[], None] | None = None, **changes: object):
        arguments = {**setup.arguments, "output_dir": str(folder), "resume_from_checkpoint": "latest", **changes}
        self.log = folder.with_name(f"{folder.name}.log")
        self.log_start = self.log.stat().st_size if self.log.is_file() else 0
        self.processes = start_script(setup.script, flags(**arguments), self.log, setup.num_processes, prelude=prelude)

    @property
    def printed(self) -> str:
        """What this start has printed."""
        return self.log.read_bytes()[self.log_start :].decode() if self.log.is_file() else ""

    def is_running(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def wait(self, until: Callable[[], bool], timeout: float = HANGS_AFTER) -> bool:
        """Waits until `until()` holds or a process has ended. Returns whether it held."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if until():
                return True
            if not self.is_running():
                return False
            time.sleep(0.001)
        return False

    def kill(self, number: int = signal.SIGKILL, ranks: list[int] | None = None) -> None:
        """Sends a signal to the processes (None: all) and what they have started, if they are alive."""
        for rank, process in enumerate(self.processes):
            if ranks is None or rank in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)

    def join(self, timeout: float = HANGS_AFTER) -> list[int | None]:
        """The exit codes; None for a process that hangs, which is then killed."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        self.kill()
        for process in self.processes:
            process.join()
        return codes


# 1. Moments


def _is_writing(folder: Path) -> bool:
    return any(folder.glob(".writing-checkpoint-*"))


@dataclass
class Aim:
    """
    A moment to kill a run at: a random time up to `within` seconds after `once(folder, last step)` first holds, or
    after the start.
    """

    name: str
    once: Callable[[Path, int], bool] | None
    within: float


AIMS = (
    Aim("any moment", None, 0.0),  # within the duration of the unbroken run
    Aim("writing a checkpoint", lambda folder, last: _is_writing(folder), 0.06),
    Aim("validation", lambda folder, last: any(folder.glob("samples-*.png")), 0.3),
    Aim("the final save", lambda folder, last: (folder / f"checkpoint-{last}").is_dir(), 0.3),
)


# 2. Histories


def rows_by_span(folder: Path) -> dict[tuple[int, int], dict]:
    """The rows of training metrics, by the step of the row before and their own; validations by twice their step."""
    found, previous = {}, 0
    for row in read_metrics(folder, without=TIMINGS):
        is_validation = "loss" not in row
        found[(row["step"] if is_validation else previous, row["step"])] = row
        if not is_validation:
            previous = row["step"]
    return found


@dataclass
class Tally:
    """What became of the faults of one kind."""

    fault: str
    tried: int = 0
    survived: int = 0
    notes: list[str] = field(default_factory=list)

    def count(self, survived: bool, note: str = "") -> None:
        self.tried += 1
        self.survived += survived
        if not survived:
            self.notes.append(note)


class Laboratory:
    """
    Runs histories of one set-up in a folder, with an unbroken run to compare them with.

    Attributes:
        unbroken (`Path`): The folder of the unbroken run.
        seconds (`float`): How long it took.
    """

    def __init__(self, setup: Setup, folder: Path, generator: random.Random):
        self.setup, self.folder, self.random = setup, folder, generator
        folder.mkdir(parents=True)
        self.last_step = int(setup.arguments["max_train_steps"])
        self.unbroken = folder / "unbroken"
        start = time.monotonic()
        attempt = Attempt(setup, self.unbroken, resume_from_checkpoint=None)
        codes = attempt.join()
        self.seconds = time.monotonic() - start
        if codes != [0] * setup.num_processes:
            raise RuntimeError(f"The unbroken run of {setup.name} failed ({codes}):\n{attempt.printed}")
        self.number = 0

    def new_folder(self) -> Path:
        self.number += 1
        return self.folder / f"broken-{self.number}"

    def start(self, folder: Path, **options: object) -> Attempt:
        """A first start, or a resumed one."""
        if find_latest_checkpoint(folder) is None:
            options = {"resume_from_checkpoint": None, "overwrite_output_dir": True, **options}
        return Attempt(self.setup, folder, **options)

    def killed_at(self, folder: Path, aim: Aim) -> bool:
        """Starts a run and kills it at that moment. Returns whether it was killed (it may have ended before)."""
        attempt = self.start(folder)
        if aim.once is None:
            delay = self.random.uniform(0.0, self.seconds)
        else:
            before = set(folder.glob("samples-*.png")) if aim.name == "validation" else set()
            if before:  # pictures of an earlier start
                attempt.wait(lambda: bool(set(folder.glob("samples-*.png")) - before))
            else:
                attempt.wait(lambda: aim.once(folder, self.last_step))
            delay = self.random.uniform(0.0, aim.within)
        end = time.monotonic() + delay
        attempt.wait(lambda: time.monotonic() >= end)
        was_running = attempt.is_running()
        attempt.kill()
        codes = attempt.join()
        return was_running and all(code == -signal.SIGKILL for code in codes)

    def finish(self, folder: Path, has_further_rows: bool = False) -> str:
        """Resumes the run until its end. Returns what went wrong, or ""; see `differences`."""
        attempt = self.start(folder)
        codes = attempt.join()
        if codes != [0] * self.setup.num_processes:
            return f"resuming ended with {codes}: {attempt.printed[-2000:]}"
        return self.differences(folder, has_further_rows)

    def differences(self, folder: Path, has_further_rows: bool = False) -> str:
        """
        How a history differs from the unbroken run; "" for equal losses, weights and optimizer state. A run that was
        told to stop `has_further_rows`: its last checkpoint ends a row of the log. Rows of equal spans are compared.
        """
        try:
            first, second = (rows_by_span(path) for path in (self.unbroken, folder))
            spans = [span for span in first if span in second] if has_further_rows else list(first)
            differing = [(first[span], second.get(span)) for span in spans if first[span] != second.get(span)]
            assert not differing, f"the losses differ ({len(first)} and {len(second)} rows): {differing[:1]}"
            assert has_further_rows or len(first) == len(second), "there are further rows of losses"
            name = f"checkpoint-{self.last_step}"
            assert_same_checkpoint(self.unbroken / name, folder / name)
            for path in sorted(self.unbroken.rglob("*.safetensors")):
                relative = path.relative_to(self.unbroken)
                if not relative.parts[0].startswith("checkpoint-"):
                    assert_same_state(load_file(path), load_file(folder / relative), str(relative))
        except (AssertionError, OSError, json.JSONDecodeError) as error:
            return str(error)[:500] or type(error).__name__
        return ""

    def clean(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_name(f"{folder.name}.log").unlink(missing_ok=True)
