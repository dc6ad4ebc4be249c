"""Checkpoints: complete or absent, whatever kills the run; the right ones kept; everything back on resume."""

import os
import pickle
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from processes import run_distributed, start

from diffusers_adm.training import manifest
from diffusers_adm.training.checkpoints import (
    TrainingProgress,
    find_checkpoint,
    find_latest_checkpoint,
    resume_checkpoint,
    save_checkpoint,
)
from diffusers_adm.training.manifest import write_manifest


class Run:
    """A training run of toy size, whose only state is the number of its step."""

    def __init__(self, width=8):
        self.accelerator = Accelerator(cpu=True)
        self.model = torch.nn.Linear(width, width)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.progress = TrainingProgress()
        self.accelerator.register_for_checkpointing(self.progress)

    def save(self, output_dir, step, **options):
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(step)
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(step)),
                    "exp_avg": torch.full_like(parameter, step),
                    "exp_avg_sq": torch.full_like(parameter, step),
                }
        self.progress.global_step = step
        return save_checkpoint(self.accelerator, output_dir, step, **options)

    def assert_at(self, step):
        for parameter in self.model.parameters():
            assert torch.all(parameter == step)
            assert torch.all(self.optimizer.state[parameter]["exp_avg_sq"] == step)
        assert self.progress.global_step == step


def steps_in(folder):
    return sorted(int(name.removeprefix("checkpoint-")) for name in os.listdir(folder) if name[0] != ".")


def test_round_trip_of_everything(tmp_path):
    run = Run()
    run.progress.epoch, run.progress.batch_in_epoch, run.progress.micro_step = 2, 5, 45
    path = run.save(tmp_path, 9)
    assert path == str(tmp_path / "checkpoint-9")
    resumed = Run()
    assert resume_checkpoint(resumed.accelerator, tmp_path, "latest") == path
    resumed.assert_at(9)
    assert resumed.progress == TrainingProgress(9, 45, 2, 5)


def test_progress_of_other_versions():
    progress = TrainingProgress(5, 6, 7, 8)
    progress.load_state_dict({"global_step": 3})  # of an earlier one
    assert progress == TrainingProgress(global_step=3)
    with pytest.raises(ValueError, match=r"holds the counters \['of_a_later_version'\], which this version"):
        progress.load_state_dict({"global_step": 4, "of_a_later_version": 1})


def test_latest_is_by_number_and_ignores_everything_else(tmp_path):
    assert find_latest_checkpoint(tmp_path / "nowhere") is None
    assert find_latest_checkpoint(tmp_path) is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-best", "checkpoint-11.bak", ".writing-checkpoint-12"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-13").write_text("a file")
    assert find_latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_rotation_keeps_the_newest(tmp_path):
    run = Run()
    for step in (8, 9, 10, 11):
        run.save(tmp_path, step, total_limit=2)
    assert steps_in(tmp_path) == [10, 11]
    run.save(tmp_path, 12)
    assert steps_in(tmp_path) == [10, 11, 12]
    run.save(tmp_path, 13, total_limit=1)
    assert os.listdir(tmp_path) == ["checkpoint-13"]
    with pytest.raises(ValueError, match="`total_limit` is 0"):
        run.save(tmp_path, 14, total_limit=0)


def test_rotation_drops_an_abandoned_branch_before_the_new_one(tmp_path, caplog):
    run = Run()
    for step in (100, 200, 300):
        run.save(tmp_path, step)
    resume_checkpoint(run.accelerator, tmp_path, "checkpoint-100")
    assert "although checkpoint-200, checkpoint-300 exist" in caplog.text
    run.save(tmp_path, 150, total_limit=3)
    assert steps_in(tmp_path) == [100, 150, 200]
    run.save(tmp_path, 160, total_limit=2)
    assert steps_in(tmp_path) == [150, 160]


def test_saving_a_step_again_replaces_it(tmp_path):
    run = Run()
    run.save(tmp_path, 5)
    run.progress.micro_step = 77
    run.save(tmp_path, 5)
    assert os.listdir(tmp_path) == ["checkpoint-5"]
    resumed = Run()
    resume_checkpoint(resumed.accelerator, tmp_path, "latest")
    assert resumed.progress.micro_step == 77


def test_a_run_killed_between_the_two_renames_of_a_replacement(tmp_path):
    run = Run()
    run.save(tmp_path, 4)
    os.rename(tmp_path / "checkpoint-4", tmp_path / ".replaced-checkpoint-4")
    assert resume_checkpoint(run.accelerator, tmp_path, "latest") == str(tmp_path / "checkpoint-4")


def test_how_a_checkpoint_can_be_named(tmp_path, monkeypatch, caplog):
    run = Run()
    path = run.save(tmp_path / "run", 3)
    run.save(tmp_path / "run", 4)
    for name in (path, "checkpoint-3", path + os.sep):
        resume_checkpoint(run.accelerator, tmp_path / "run", name)
        run.assert_at(3)
    assert resume_checkpoint(run.accelerator, tmp_path / "run", None) is None
    caplog.clear()
    assert resume_checkpoint(run.accelerator, tmp_path / "new", "latest") is None
    assert "starting a new run" in caplog.text
    with pytest.raises(ValueError, match="neither a folder nor .* found in .*: checkpoint-3, checkpoint-4"):
        resume_checkpoint(run.accelerator, tmp_path / "run", "checkpoint-5")
    with pytest.raises(ValueError, match="is not a complete checkpoint"):
        resume_checkpoint(run.accelerator, tmp_path / "run", str(tmp_path / "run"))


def test_the_result_is_written_before_the_checkpoint_has_its_name(tmp_path):
    run = Run()
    folders = []

    def save_result(folder):
        folders.append(Path(folder).name)
        Path(folder, "result.txt").write_text("the result")

    run.save(tmp_path, 1, save_result=save_result)
    assert folders == [".writing-checkpoint-1"]
    assert (tmp_path / "checkpoint-1" / "result.txt").read_text() == "the result"

    def fail(folder):
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        run.save(tmp_path, 2, save_result=fail)
    assert find_latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


def test_weights_of_another_network(tmp_path):
    Run().save(tmp_path, 1)
    with pytest.raises(ValueError, match=r"another network: 2 of 2 tensors differ, such as .*\(8.*\) there and \(9"):
        resume_checkpoint(Run(width=9).accelerator, tmp_path, "latest")


@pytest.mark.parametrize(("before", "now"), [(True, True), (True, False), (False, True)])
def test_gradient_scaler_of_fp16(tmp_path, before, now):
    """A run may go on in another precision: its scaler starts as a new one, or is left behind."""
    run, resumed = Run(), Run()
    if before:
        run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    if now:
        resumed.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    run.save(tmp_path, 3)
    resume_checkpoint(resumed.accelerator, tmp_path, "latest")
    resumed.assert_at(3)
    if now:
        assert resumed.accelerator.scaler.get_scale() == (8.0 if before else 16.0)


def test_registered_objects_that_are_not_restored(tmp_path):
    run = Run()
    run.save(tmp_path, 3)
    resumed = Run()
    resume_checkpoint(resumed.accelerator, tmp_path, "latest", not_restored=[resumed.progress])
    assert resumed.progress == TrainingProgress()
    resumed.accelerator.register_for_checkpointing(TrainingProgress())
    with pytest.raises(ValueError, match="holds the state of 1 objects besides the networks, but this run has 2"):
        resume_checkpoint(resumed.accelerator, tmp_path, "latest")


def save_for_ever(output_dir):
    torch.set_num_threads(1)
    run = Run(width=700)  # 6 MB with the optimizer: long enough to be caught in the act
    for step in range(1, 10**6):
        run.save(output_dir, step, total_limit=2)


def test_a_run_killed_while_saving_leaves_only_whole_checkpoints(tmp_path):
    interrupted = 0
    for attempt in range(6):
        output_dir = tmp_path / str(attempt)
        process = start(save_for_ever, output_dir)
        deadline = time.monotonic() + 60
        while find_latest_checkpoint(output_dir) is None or (attempt % 2 and not list(output_dir.glob(".writing-*/*"))):
            assert process.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.0005)
        if attempt % 2 == 0:  # odd attempts kill at the first file that is written, the others anywhere
            time.sleep(0.01 + 0.007 * attempt)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        interrupted += len(list(output_dir.glob(".writing-*")))

        latest = find_latest_checkpoint(output_dir)
        for checkpoint in output_dir.glob("checkpoint-*"):
            resumed = Run(width=700)
            resume_checkpoint(resumed.accelerator, output_dir, str(checkpoint))
            resumed.assert_at(int(checkpoint.name.removeprefix("checkpoint-")))
        assert Path(latest).is_dir()
        assert not list(output_dir.glob(".*"))
    assert interrupted >= 1, "no attempt was killed while writing: the test has shown nothing"


def save_and_resume(output_dir):
    run = Run()
    for step in (1, 2, 3):
        run.save(output_dir, step, total_limit=2)
    torch.manual_seed(run.accelerator.process_index)
    run.save(output_dir, 4, total_limit=2)
    expected = torch.rand(()).item()
    torch.manual_seed(99)
    resumed = Run()
    resume_checkpoint(resumed.accelerator, output_dir, "latest")
    resumed.assert_at(4)
    return expected, torch.rand(()).item()


def test_two_processes(tmp_path, caplog):
    results = run_distributed(save_and_resume, tmp_path)
    assert steps_in(tmp_path) == [3, 4]
    assert not list(tmp_path.glob(".*"))
    assert {path.name for path in (tmp_path / "checkpoint-4").glob("random_states_*")} == {
        f"random_states_{rank}.{suffix}" for rank in range(2) for suffix in ("json", "safetensors")
    }
    assert all(expected == drawn for expected, drawn in results)
    assert results[0] != results[1]
    resume_checkpoint(Run().accelerator, tmp_path, "latest")
    assert "was written by 2 processes and is resumed by 1" in caplog.text


STATE_FILES = ("run_state.json", "run_state.safetensors", "random_states_0.json", "random_states_0.safetensors")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders with a checkpoint-1 and a checkpoint-2, each with a record: of this version, and of pickles."""
    folder, run = tmp_path_factory.mktemp("saved"), Run()
    for step in (1, 2):
        run.save(folder / "new", step, save_record=lambda name: Path(name, "record.json").write_text('{"step": 1}'))
        # As Accelerate writes it, and earlier versions did.
        run.accelerator.save_state(str(folder / "old" / f"checkpoint-{step}"))
    return folder


@pytest.fixture
def whole(saved, tmp_path):
    """The second of two checkpoints in `tmp_path`."""
    return shutil.copytree(saved / "new", tmp_path, dirs_exist_ok=True) / "checkpoint-2"


def cut(file, left):
    content = file.read_bytes()
    file.write_bytes(content[: int(left * len(content))])


def flip_a_bit(file, _):
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)


def remove(file, _):
    file.unlink()


DAMAGES = {"empty": (cut, 0.0), "cut": (cut, 0.99), "altered": (flip_a_bit, None), "missing": (remove, None)}


@pytest.mark.parametrize("name", ["model.safetensors", "record.json", "manifest.json", *STATE_FILES])
@pytest.mark.parametrize("damage", DAMAGES)
def test_latest_skips_a_damaged_checkpoint_loudly(whole, tmp_path, caplog, name, damage):
    function, argument = DAMAGES[damage]
    function(whole / name, argument)
    resumed = Run()
    if (name, damage) == ("manifest.json", "altered"):  # of one hash, or of the structure
        (whole / name).write_text((whole / name).read_text().replace('": "', '": "0', 1))
    assert resume_checkpoint(resumed.accelerator, tmp_path, "latest") == str(tmp_path / "checkpoint-1")
    resumed.assert_at(1)
    (message,) = [record.getMessage() for record in caplog.records if "DAMAGED" in record.getMessage()]
    # A damaged manifest accuses the file whose entry was changed.
    assert name in message or name == "manifest.json"
    assert "goes on from checkpoint-1" in message
    with pytest.raises(ValueError, match=r"'checkpoint-2', but .*(damaged|missing).* found in .*: checkpoint-1\."):
        resume_checkpoint(resumed.accelerator, tmp_path, "checkpoint-2")


def test_without_a_sound_checkpoint_all_faults_are_named(whole, tmp_path):
    (whole / "model.safetensors").unlink()
    cut(tmp_path / "checkpoint-1" / "run_state.safetensors", 0.5)
    with pytest.raises(
        ValueError, match="no checkpoint in .* is sound: .*2.model.*is missing; .*1.run_state.saf.*damaged"
    ):
        resume_checkpoint(Run().accelerator, tmp_path, "latest")


def test_files_are_hashed_once_for_a_resume(whole, tmp_path, monkeypatch):
    hashed, hash_file = [], manifest._hash_file
    monkeypatch.setattr(manifest, "_hash_file", lambda file: hashed.append(file.name) or hash_file(file))
    assert find_checkpoint(tmp_path, "latest") == whole  # as `parse_run` does before the processes join
    resume_checkpoint(Run().accelerator, tmp_path, "latest")
    assert sorted(hashed) == sorted({"model.safetensors", "record.json", *STATE_FILES})


def resume_damaged(output_dir):
    resumed = Run()
    return resume_checkpoint(resumed.accelerator, output_dir, "latest"), resumed.progress.global_step


def test_two_processes_skip_the_same_checkpoint(whole, tmp_path):
    flip_a_bit(whole / "model.safetensors", None)
    assert run_distributed(resume_damaged, tmp_path) == [(str(tmp_path / "checkpoint-1"), 1)] * 2


# Unpickling


class Opener:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("writer", [torch.save, lambda obj, file: Path(file).write_bytes(pickle.dumps(obj))])
@pytest.mark.parametrize(
    "name",
    ["optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl", "scaler.pt", "model.bin", "pytorch_model.bin"]
    + ["scheduler.bin", "unet/diffusion_pytorch_model.bin"],
)
@pytest.mark.parametrize("version", ["new", "old"])
def test_pickles_that_run_code_are_refused(saved, tmp_path, writer, name, version):
    whole = shutil.copytree(saved / version, tmp_path, dirs_exist_ok=True) / "checkpoint-2"
    (whole / name).parent.mkdir(exist_ok=True)
    writer({"state": {}, "evil": Opener(tmp_path / "executed")}, whole / name)
    if name == "pytorch_model.bin":
        (whole / "model.safetensors").unlink()
        if version == "new":
            write_manifest(whole)
    with pytest.raises(ValueError, match=f"{name}.*(could run code|is damaged)"):
        resume_checkpoint(Run().accelerator, tmp_path, "checkpoint-2")
    if writer is torch.save:
        with pytest.raises(ValueError, match=f"{name} holds more than .*could run code.* do not trust"):
            find_checkpoint(tmp_path, "latest")
    assert not (tmp_path / "executed").exists()


def test_checkpoints_of_pickles_are_still_loaded(saved, tmp_path):
    path = shutil.copytree(saved / "old" / "checkpoint-2", tmp_path / "checkpoint-2")
    assert {file.name for file in path.iterdir()} == {
        "model.safetensors",
        "optimizer.bin",
        "custom_checkpoint_0.pkl",
        "random_states_0.pkl",
    }
    resumed = Run()
    assert resume_checkpoint(resumed.accelerator, tmp_path, "latest") == str(path)
    resumed.assert_at(2)
    for name in ("model.safetensors", "optimizer.bin", "custom_checkpoint_0.pkl", "random_states_0.pkl"):
        content = (path / name).read_bytes()
        for left in (0.0, 0.5, 0.99):
            cut(path / name, left)
            with pytest.raises(ValueError, match=rf"{name} \([\d,]+ bytes\) is damaged"):
                resume_checkpoint(resumed.accelerator, tmp_path, "latest")
            (path / name).write_bytes(content)


def test_no_checkpoint_holds_a_pickle(whole):
    assert {file.suffix for file in whole.rglob("*") if file.is_file()} == {".json", ".safetensors"}
