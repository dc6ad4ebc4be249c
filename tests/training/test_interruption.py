"""Runs that end early: signals, limits of time, dry runs; and runs that have lost a process."""

import multiprocessing
import os
import signal
import sys
import time

import pytest
import torch
from faulty_runs import arguments_of, replaced, train
from processes import start, start_distributed
from runs import read_metrics

from diffusers_adm.commands.errors import CommandError, run_command
from diffusers_adm.commands.lost_processes import explain_lost_process
from diffusers_adm.training import TrainingRun, find_latest_checkpoint
from diffusers_adm.training.interruption import Interruption, parse_max_time


def at_step(step, act, method="backward"):
    """Calls `act(run)` within a call of a method of the run, in the optimizer step with this number."""
    call, done = getattr(TrainingRun, method), []

    def acting(self, *args, **kwargs):
        if self.progress.global_step + (method == "backward") == step and not done:
            done.append(act(self))
        return call(self, *args, **kwargs)

    return replaced(TrainingRun, method, acting)


def signalled(arguments, step, numbers, method="backward", group=False, rank=0):
    """Trains, and gets signals meanwhile: this process, or all of its group. For a process of its own."""
    if group:
        os.setsid()
        fork_workers()

    def send(run):
        for number in numbers if run.accelerator.process_index == rank else ():
            os.killpg(0, number) if group else os.kill(os.getpid(), number)

    with at_step(step, send, method):
        raise SystemExit(train(arguments))


def fork_workers():
    """As in a process that the shell has started; here, each worker would import everything anew."""
    multiprocessing.set_start_method("fork", force=True)


def exit_code(process, seconds=60):
    process.join(timeout=seconds)
    code = process.exitcode
    process.kill()
    return code


@pytest.mark.no_jitter("compares two runs bit by bit")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_answered_after_the_step(tmp_path, number):
    """Also by the workers of the data loader, which get it too. The same command goes on as if nothing had been."""
    arguments = arguments_of(tmp_path / "stopped", max_train_steps=4, dataloader_num_workers=1)
    process = start(signalled, arguments, 2, [number], "backward", True, daemon=False)
    assert exit_code(process) == 75
    folder = tmp_path / "stopped" / "run"
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (folder / "model_index.json").exists()  # of a result
    assert train(arguments | {"resume_from_checkpoint": "latest"}) == 0
    if number == signal.SIGTERM:
        assert train(arguments_of(tmp_path / "unbroken", max_train_steps=4)) == 0
        unbroken = tmp_path / "unbroken" / "run"
        assert read_metrics(folder) == read_metrics(unbroken)
        for name in ("unet/diffusion_pytorch_model.safetensors", "model_index.json"):
            assert (folder / name).read_bytes() == (unbroken / name).read_bytes()


def test_a_second_signal_ends_at_once(tmp_path):
    process = start(signalled, arguments_of(tmp_path), 2, [signal.SIGUSR1, signal.SIGTERM], daemon=False)
    assert exit_code(process) == 128 + signal.SIGTERM
    assert find_latest_checkpoint(tmp_path / "run") is None


def test_the_same_signal_passed_on_by_a_launcher(tmp_path):
    """A queue sends it to launcher and process, and the launcher sends it to the process as well."""
    process = start(signalled, arguments_of(tmp_path), 2, [signal.SIGTERM, signal.SIGTERM], daemon=False)
    assert exit_code(process) == 75
    assert find_latest_checkpoint(tmp_path / "run").endswith("checkpoint-2")


@pytest.mark.parametrize("method", ["save_checkpoint", "validate"])
def test_a_signal_during_a_checkpoint_or_a_validation(tmp_path, method):
    """Neither is broken off; the run ends after the next step."""
    arguments = arguments_of(tmp_path, max_train_steps=9, checkpointing_steps=2, validation_steps=2)
    process = start(signalled, arguments, 2, [signal.SIGTERM], method, daemon=False)
    assert exit_code(process) == 75
    found = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert found == ["checkpoint-2", "checkpoint-3"]
    assert (tmp_path / "run" / "samples-0000002.png").exists()
    assert not (tmp_path / "run" / "samples-0000003.png").exists()


def test_a_signal_during_the_final_validation(tmp_path):
    """The result is there; it was not validated, and the same command does that."""
    arguments = arguments_of(tmp_path, max_train_steps=2)
    assert exit_code(start(signalled, arguments, 2, [signal.SIGTERM], "_save", daemon=False)) == 75
    assert (tmp_path / "run" / "model_index.json").exists()
    assert not list((tmp_path / "run").glob("samples-*.png"))
    assert train(arguments | {"resume_from_checkpoint": "latest"}) == 0
    assert (tmp_path / "run" / "samples-0000002.png").exists()


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes(tmp_path):
    arguments = arguments_of(tmp_path, train_batch_size=2)
    processes, _ = start_distributed(signalled, arguments, 2, [signal.SIGTERM], "backward", False, 1)
    assert [exit_code(process) for process in processes] == [75, 75]
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]


def test_other_programs_keep_their_handlers(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    assert train(arguments_of(tmp_path, max_train_steps=1)) == 0
    assert signal.getsignal(signal.SIGTERM) is before


# Limits of time


def test_no_time_is_left(tmp_path, caplog):
    assert train(arguments_of(tmp_path, max_time="0.001")) == 75
    assert find_latest_checkpoint(tmp_path / "run").endswith("checkpoint-1")
    assert "stopped after step 1 of 5, because of `--max_time`" in caplog.text
    assert train(arguments_of(tmp_path, max_time="1:00:00", resume_from_checkpoint="latest")) == 0


@pytest.mark.parametrize(("value", "seconds"), [("01:02:03", 3723), ("90", 5400), ("0.5", 30), ("100:00:00", 360000)])
def test_durations(value, seconds):
    assert parse_max_time(value) == seconds


@pytest.mark.parametrize("value", ["", "1:2:3", "1:60:00", "-5", "soon", "0", "00:00:00", "1h"])
def test_what_is_no_duration(value):
    with pytest.raises(ValueError, match="`max_time` is .*; it must be a duration, HH:MM:SS or a number of minutes"):
        parse_max_time(value)


def test_time_for_what_is_still_to_be_done():
    """Of an hour: 30 s until the process has ended, and what a checkpoint and a validation took."""
    interruption = Interruption("60", started=time.monotonic() - 3600 + 100)
    assert interruption.is_time_up  # a checkpoint may take three minutes, as long as none has been written
    interruption.longest = {"checkpoint": 20.0}
    assert not interruption.is_time_up
    interruption.longest["validation"] = 60.0
    assert interruption.is_time_up
    interruption.longest["validation"] = 10.0
    assert not interruption.is_time_up
    interruption.steps.append(25.0)  # two of them
    assert interruption.is_time_up
    assert not Interruption(None, started=0.0).is_time_up


def test_the_parts_of_a_validation_are_one():
    """Measures, images and the best result, each of which is measured; after another step, they begin anew."""
    interruption = Interruption("60")
    for parts in (3, 2):
        for _ in range(parts):
            with interruption.measuring("validation"):
                time.sleep(0.02)
        interruption.count_step()
    assert 0.06 <= interruption.longest["validation"] < 0.06 + 0.5
    assert sum(interruption._spent.values()) == 0


# Dry runs


def test_a_dry_run_leaves_nothing(tmp_path, caplog):
    arguments = arguments_of(tmp_path, dry_run=True, validation_steps=2, checkpointing_steps=2)
    assert train(arguments) == 0
    assert not (tmp_path / "run").exists()
    assert "Dry run: " in caplog.text
    for text in ("of memory", "for a step", "for a checkpoint", "for a validation", "5 steps would take"):
        assert text in caplog.text
    del arguments["dry_run"]
    assert train(arguments | {"max_train_steps": 2}) == 0
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    # That of a resumed run, from its checkpoint. Without it, it is refused as the real one would be.
    assert train(arguments | {"dry_run": True, "resume_from_checkpoint": "latest"}) == 0
    with pytest.raises(ValueError, match="holds checkpoint-2 of another run"):
        train(arguments | {"dry_run": True})
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == files


def test_a_dry_run_that_was_killed_does_not_stop_the_next_one(tmp_path):
    (tmp_path / "run" / ".dry-run" / "checkpoint-1").mkdir(parents=True)
    assert train(arguments_of(tmp_path, dry_run=True)) == 0
    assert not (tmp_path / "run").exists()


def test_a_dry_run_whose_validation_fails(tmp_path, caplog):
    def fail(self, generate, panels=None):
        raise RuntimeError("no images")

    with replaced(TrainingRun, "show_samples", fail), pytest.raises(CommandError, match="validation of the dry run"):
        train(arguments_of(tmp_path, dry_run=True))
    assert not (tmp_path / "run").exists()


# Lost processes


def lose(arguments, step, kill, messages):
    """Runs the command as its script does; what it prints goes to a file."""
    fork_workers()
    sys.stderr = open(messages, "w", buffering=1)  # noqa: SIM115
    with at_step(step, kill):
        run_command(lambda: train(arguments))


def kill_worker(run):
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGKILL)


def test_a_killed_worker(tmp_path):
    """Says so, and the run goes on from its checkpoint."""
    arguments = arguments_of(tmp_path, dataloader_num_workers=1, checkpointing_steps=1)
    begin = time.monotonic()
    assert exit_code(start(lose, arguments, 2, kill_worker, tmp_path / "messages", daemon=False)) == 1
    assert time.monotonic() - begin < 60
    assert "error: A worker process of the data loader has ended" in (tmp_path / "messages").read_text()
    assert train(arguments | {"resume_from_checkpoint": "latest"}) == 0


def kill_second(run):
    if run.accelerator.process_index == 1:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_rank(tmp_path):
    """The other one says so."""
    arguments = arguments_of(tmp_path, train_batch_size=2, checkpointing_steps=2)
    processes, _ = start_distributed(lose, arguments, 3, kill_second, tmp_path / "messages")
    assert exit_code(processes[1]) == -signal.SIGKILL
    begin = time.monotonic()
    assert exit_code(processes[0]) == 1
    assert time.monotonic() - begin < 60
    assert "error: The connection to another process is lost" in (tmp_path / "messages").read_text()
    assert find_latest_checkpoint(tmp_path / "run").endswith("checkpoint-2")


def test_errors_of_other_kinds():
    assert explain_lost_process(RuntimeError("The size of tensor a (2) must match")) is None
    assert explain_lost_process(RuntimeError()) is None
    assert explain_lost_process(ValueError("Connection reset by peer")) is None  # a server's
    assert "(NCCL" in explain_lost_process(torch.distributed.DistBackendError("NCCL communicator was aborted"))
