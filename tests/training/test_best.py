"""The best result of a run: which values are better, whole folders, resuming, and what is refused."""

import json
import math
import shutil

import pytest
from runs import EMOJI, SHORT_RUN, flags, own_process_state, read_metrics, reset_accelerate
from safetensors.torch import load_file
from scripts import load_script
from test_train_adm import write_model_config

from diffusers_adm import ADMPipeline
from diffusers_adm.training.best import BestResult, check_keep_best, delete_best, is_higher_better
from diffusers_adm.training.log import TrainingLog


train_adm = load_script("train_adm")


@pytest.mark.parametrize(
    ("measure", "higher"),
    [
        ("validation_loss", False),
        ("validation_bits_per_dim", False),
        ("validation_frechet_distance", False),
        ("validation_rfid", False),
        ("validation_balanced_accuracy", True),
        ("validation_psnr", True),
        ("validation_without_variants_text_to_image_recall_at_5", True),
        ("validation_best_similarity", True),
        ("validation_loss_standard_error", None),
        ("validation_text_similarity", None),  # of the data
        ("validation_text_to_image_recall_at_1_error", None),
    ],
)
def test_directions(measure, higher):
    assert is_higher_better(measure) is higher


def test_what_is_not_measured_is_refused_by_name():
    measures = ["validation_loss", "validation_loss_standard_error"]
    check_keep_best("validation_loss", measures)
    with pytest.raises(ValueError, match="`keep_best` is 'validation_psnr'.*They measure validation_loss: name"):
        check_keep_best("validation_psnr", measures)
    with pytest.raises(ValueError, match="do not measure"):
        check_keep_best("validation_loss_standard_error", measures)
    with pytest.raises(ValueError, match="measure nothing. Name held-out data"):
        check_keep_best("validation_loss", [])


def write(text):
    def save_result(folder):
        with open(f"{folder}/weights", "w") as file:
            file.write(text)

    return save_result


class TestFolder:
    def test_a_failure_leaves_no_half_of_a_result(self, tmp_path):
        """Which would take the room of the next checkpoint, when the disk is full."""

        def fail(folder):
            write("half")(folder)
            raise OSError("No space left on device")

        best = BestResult(tmp_path, "validation_loss")
        best.save(write("first"), 2.0, 1)
        with pytest.raises(OSError, match="No space"):
            best.save(fail, 1.0, 2)
        assert [path.name for path in tmp_path.iterdir()] == ["best"]
        assert (tmp_path / "best" / "weights").read_text() == "first"
        assert best.is_better(1.5)

    def test_a_new_run_inherits_nothing_from_one_that_was_killed(self, tmp_path):
        """Between the two names of the folder."""
        BestResult(tmp_path, "validation_loss").save(write("first"), 2.0, 1)
        (tmp_path / "best").rename(tmp_path / ".replaced-best")
        delete_best(tmp_path)
        assert not list(tmp_path.iterdir())

    def test_only_a_better_one_replaces_it(self, tmp_path):
        best = BestResult(tmp_path, "validation_psnr")
        assert best.is_better(-math.inf) is best.is_better(math.nan) is best.is_better(None) is False
        assert best.is_better(20.0)
        best.save(write("first"), 20.0, step=5)
        assert best.is_better(21.0)
        assert not best.is_better(20.0)
        best.save(write("second"), 21.0, step=10)
        assert (tmp_path / "best" / "weights").read_text() == "second"
        assert [path.name for path in tmp_path.iterdir()] == ["best"]
        resumed = BestResult(tmp_path, "validation_psnr", step=10)
        assert resumed.value == 21.0
        assert BestResult(tmp_path, "validation_loss", step=10).is_better(1e6)  # by another measure

    def test_a_failure_leaves_the_former_one(self, tmp_path):
        best = BestResult(tmp_path, "validation_loss")
        best.save(write("first"), 2.0, step=5)

        def fails(folder):
            write("half")(folder)
            raise OSError("No space left on device")

        with pytest.raises(OSError, match="No space"):
            best.save(fails, 1.0, step=10)
        assert (tmp_path / "best" / "weights").read_text() == "first"
        assert best.is_better(1.5)

    def test_a_changed_run_does_not_keep_what_comes_later(self, tmp_path):
        BestResult(tmp_path, "validation_loss").save(write("of step 10"), 2.0, step=10)
        assert BestResult(tmp_path, "validation_loss", step=5).value == 2.0  # it will come there again
        assert BestResult(tmp_path, "validation_loss", step=10, is_other_run=True).value == 2.0
        assert BestResult(tmp_path, "validation_loss", step=5, is_other_run=True).value is None
        assert not (tmp_path / "best").exists()


@pytest.fixture
def train(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    given = SHORT_RUN | {"model_config_name_or_path": write_model_config(tmp_path), "data_files": EMOJI}
    given |= {"max_train_samples": 16, "num_validation_images": 1, "validation_num_inference_steps": 1}
    given |= {"max_train_steps": 4, "learning_rate": 1e-2, "validation_steps": 1, "checkpointing_steps": 1}
    given |= {"validation_data_files": EMOJI, "max_validation_samples": 8, "ema_max_decay": 0.5}

    def run(folder="run", **arguments):
        reset_accelerate()
        train_adm.main(flags(**given | {"output_dir": tmp_path / folder} | arguments))
        return tmp_path / folder

    with own_process_state("train_adm"):
        yield run


def test_the_best_of_a_run(train, tmp_path, monkeypatch):
    """A loss that is lowest in the middle; the weights are those of the checkpoint of that step, averaged ones."""
    wanted = {1: 5.0, 2: 1.0, 3: 3.0, 4: 4.0}
    write_validation = TrainingLog.write_validation

    def pretend(self, step, values):
        write_validation(self, step, {**values, "loss": wanted[step]})

    monkeypatch.setattr(TrainingLog, "write_validation", pretend)
    folder = train(keep_best="validation_loss", checkpoints_total_limit=3)
    expected = {"measure": "validation_loss", "value": 1.0, "step": 2}
    assert json.loads((folder / "best" / "best.json").read_text()) == expected
    names = "unet", "diffusion_pytorch_model.safetensors"
    kept, of_step_2, last = (
        load_file(place.joinpath(*names)) for place in (folder / "best", folder / "checkpoint-2", folder)
    )
    assert all(kept[name].equal(of_step_2[name]) for name in kept)
    assert not all(kept[name].equal(last[name]) for name in kept)
    ADMPipeline.from_pretrained(folder / "best")
    # Killed after the checkpoint of step 2 and its validation, but before the result was kept; then after it.
    shutil.rmtree(folder / "best")
    for step in (3, 4):
        shutil.rmtree(folder / f"checkpoint-{step}")
    train(keep_best="validation_loss", resume_from_checkpoint="latest")
    assert json.loads((folder / "best" / "best.json").read_text()) == expected
    again = load_file(folder.joinpath("best", *names))
    assert all(kept[name].equal(again[name]) for name in kept)
    rows = [row["step"] for row in read_metrics(folder) if "validation_loss" in row]
    assert rows == [1, 2, 3, 4]
    # A new run does not take it for its own.
    for step in range(2, 5):
        shutil.rmtree(folder / f"checkpoint-{step}", ignore_errors=True)
    with pytest.raises(ValueError, match="holds the best result of another run"):
        train()
    train(overwrite_output_dir=True, max_train_steps=1)
    assert not (folder / "best").exists()


def test_refused_before_the_first_step(train, tmp_path):
    with pytest.raises(ValueError, match="`keep_best` is 'validation_bits_per_dim'.*They measure validation_loss"):
        train(keep_best="validation_bits_per_dim")
    assert not list(tmp_path.glob("run/*.jsonl"))
    with pytest.raises(ValueError, match="`keep_best` was given without `validation_steps`"):
        train(keep_best="validation_loss", validation_steps="none")
