"""
A disk that is full while a run writes a checkpoint, a row of its log, or its result: a small tmpfs where the tests may
mount one, and a limit on file sizes (RLIMIT_FSIZE) in a process of its own.
"""

import json
import os
import re
import resource
import subprocess
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from processes import start
from runs import EMOJI, SHORT_RUN, flags, own_process_state, read_metrics, reset_accelerate
from safetensors.torch import load_file
from scripts import load_script
from test_checkpoints import Run, steps_in
from toy_models import TOY_CONFIG

from diffusers_adm.commands.errors import CommandError
from diffusers_adm.training import run as training_run
from diffusers_adm.training.checkpoints import resume_checkpoint
from diffusers_adm.training.disk import as_disk_error
from diffusers_adm.training.log import TrainingLog


ADVICE = "then run the same command with `--resume_from_checkpoint latest`"


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_checkpoint_on_a_full_disk(small_disk):
    run = Run(width=150)  # 275 kB with the optimizer
    for step in (1, 2, 3):
        run.save(small_disk, step)
    message = (
        r"checkpoint-4 could not be written: .*No space left on device.*disk .* has \d MiB free. checkpoint-3 is the "
        f"newest checkpoint. Free some space.*{ADVICE}"
    )
    with pytest.raises(CommandError, match=message) as caught:
        run.save(small_disk, 4, total_limit=2)
    assert caught.value.exit_code == 1
    assert sorted(os.listdir(small_disk)) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]  # nothing half written
    resumed = Run(width=150)
    resume_checkpoint(resumed.accelerator, small_disk, "latest")
    resumed.assert_at(3)
    (small_disk / "checkpoint-1" / "run_state.safetensors").unlink()
    resumed.save(small_disk, 4, total_limit=2)
    assert steps_in(small_disk) == [3, 4]


def set_limit(size):
    """On the size of each file, in bytes; None: no limit."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))


def message_of(function, *arguments, file):
    """What `function` raised in a process of its own."""
    process = start(write_message, function, arguments, file)
    process.join(60)
    assert process.exitcode == 0
    return file.read_text()


def write_message(function, arguments, file):
    torch.set_num_threads(1)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    message = "no error"
    try:
        function(*arguments)
    except CommandError as error:
        message = f"{error.exit_code}: {error}"
    set_limit(None)
    file.write_text(message)


def write_rows(folder, report_to):
    accelerator = Accelerator(cpu=True, log_with=report_to, project_dir=folder)
    log = TrainingLog(accelerator, folder, {}, 0, 10**6, 4)
    for step in range(1, 4):
        log.write(step, {"loss": 1.0}, 0.1)
    size = (Path(folder) / "metrics.jsonl").stat().st_size
    set_limit(size + 20 if report_to is None else 3000)
    for step in range(4, 10**4):
        if report_to is not None:  # its file is the smaller one here
            os.truncate(Path(folder) / "metrics.jsonl", size)
        log.write(step, {"loss": 1.0}, 0.1)


def test_a_row_of_the_log(tmp_path):
    message = message_of(write_rows, str(tmp_path), None, file=tmp_path / "message")
    assert message.startswith(f"1: The row of step 4 could not be written to {tmp_path}/metrics.jsonl: [Errno 27]")
    assert ADVICE in message
    # The half-written row is dropped by a rerun, which goes on from the checkpoint of step 3.
    TrainingLog(Accelerator(cpu=True), str(tmp_path), {}, 3, 10, 4).write(4, {"loss": 2.0}, 0.1)
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]


def test_a_row_of_a_tracker(tmp_path):
    message = message_of(write_rows, str(tmp_path), "tensorboard", file=tmp_path / "message")
    assert "could not be written to a tracker: [Errno 27] File too large" in message
    assert ADVICE in message


def train(arguments):
    reset_accelerate()
    training_run.plot_loss_curves = lambda *args: None  # slow, and tested elsewhere
    load_script("train_adm").main(flags(**arguments))


def train_until_full(arguments, full_after):
    """The disk is full after so many checkpoints."""
    save_checkpoint, count = training_run.save_checkpoint, 0

    def save_then_fill(*args, **kwargs):
        nonlocal count
        path = save_checkpoint(*args, **kwargs)
        count += 1
        if count == full_after:
            set_limit(8192)  # less than the weights have
        return path

    training_run.save_checkpoint = save_then_fill
    train(arguments)


@pytest.mark.parametrize(
    ("full_after", "expected"),
    [
        (1, "1: checkpoint-2 could not be written: .*File too large.* checkpoint-1 is the newest checkpoint"),
        (2, "1: The .* could not be written to .*File too large.* checkpoint-2 is the newest checkpoint. It holds the"),
    ],
    ids=["checkpoint", "result"],
)
def test_a_run_goes_on_when_there_is_space_again(tmp_path, monkeypatch, full_after, expected):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    config = tmp_path / "model.json"
    config.write_text(json.dumps(TOY_CONFIG))
    arguments = SHORT_RUN | {"data_files": EMOJI, "max_train_samples": 16, "resolution": 8}
    arguments |= {"model_config_name_or_path": config, "checkpointing_steps": 1, "checkpoints_total_limit": 1}
    arguments |= {"num_validation_images": 1, "validation_num_inference_steps": 1}
    run = tmp_path / "run"
    arguments["output_dir"] = run
    message = message_of(train_until_full, arguments, full_after, file=tmp_path / "message")
    assert re.search(expected, message), message
    assert [path.name for path in run.glob("*checkpoint-*")] == [f"checkpoint-{full_after}"]
    monkeypatch.setattr(training_run, "plot_loss_curves", lambda *args: None)
    with own_process_state("train_adm"):
        train(arguments | {"resume_from_checkpoint": "latest"})
    assert [row["step"] for row in read_metrics(run)] == [1, 2]
    name = "unet/diffusion_pytorch_model.safetensors"
    saved, result = load_file(run / "checkpoint-2" / name), load_file(run / name)
    assert all(torch.equal(saved[key], result[key]) for key in result)


def test_other_errors_stay_as_they_are():
    for error in (ValueError("No space left on device"), OSError("the disk is full"), RuntimeError("out of memory")):
        assert as_disk_error(error, ".", "what", "kept") is error
