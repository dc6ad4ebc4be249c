"""Trackers of the curves: what is refused, TensorBoard's projects, and the run of Weights & Biases that goes on."""

import json

import pytest
from runs import EMOJI, SHORT_RUN, flags, own_process_state, reset_accelerate
from scripts import load_script
from test_train_adm import write_model_config

from diffusers_adm.training.trackers import check_tracker


train_adm = load_script("train_adm")


@pytest.fixture
def train(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    given = SHORT_RUN | {"model_config_name_or_path": write_model_config(tmp_path), "data_files": EMOJI}
    given |= {"max_train_samples": 16, "num_validation_images": 1, "output_dir": tmp_path / "run"}

    def run(**arguments):
        reset_accelerate()
        train_adm.main(flags(**given | arguments))
        return tmp_path / "run"

    with own_process_state("train_adm"):
        yield run


def test_a_missing_package_is_refused_before_anything_else(train, tmp_path, monkeypatch):
    import accelerate.tracking

    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])
    with pytest.raises(ValueError, match="`report_to` is 'wandb'.*`pip install wandb`"):
        train(report_to="wandb")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="pip install tensorboard"):
        check_tracker("tensorboard")
    check_tracker("none")


def test_project_of_tensorboard(train):
    folder = train(report_to="tensorboard", tracker_project_name="emoji")
    assert list((folder / "logs" / "emoji").glob("events.*"))
    assert not (folder / "tracker_runs.json").exists()  # it has its files here


def test_wandb_goes_on_in_the_same_run(train, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = train(report_to="wandb", max_train_steps=1)
    run_id = json.loads((folder / "tracker_runs.json").read_text())["wandb"]
    train(report_to="wandb", resume_from_checkpoint="latest")
    assert json.loads((folder / "tracker_runs.json").read_text())["wandb"] == run_id
    assert len(list((folder / "logs" / "wandb").glob(f"offline-run-*-{run_id}"))) == 2  # of one id, for `wandb sync`
    train(report_to="wandb", max_train_steps=1, overwrite_output_dir=True)  # a new run
    assert json.loads((folder / "tracker_runs.json").read_text())["wandb"] != run_id
