"""Resuming with another number of processes: no image of the epoch is lost or repeated, or the run is refused."""

import hashlib
import json
import logging

import pytest
from processes import run_distributed
from runs import EMOJI, SHORT_RUN, flags, own_process_state, reset_accelerate
from scripts import load_script
from toy_models import TOY_CONFIG

from diffusers_adm.training import run as training_run
from diffusers_adm.training.resume import StepSplit, parse_run


IMAGES, IMAGES_A_STEP = 24, 4


def train(arguments):
    """The images of each batch of this process, as hashes; those of an epoch are all different."""
    seen = []
    batches = training_run.TrainingRun.batches

    def recorded(self):
        for batch in batches(self):
            seen.extend(hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in batch["images"])
            yield batch

    reset_accelerate()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run.TrainingRun, "batches", recorded)
        patch.setattr(training_run, "plot_loss_curves", lambda *args: None)  # slow, and tested elsewhere
        try:
            load_script("train_adm").main(flags(**arguments))
        finally:
            logging.getLogger("train_adm").setLevel(logging.NOTSET)
    return seen


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Arguments of a run of two processes, and the images of its first two steps."""
    folder = tmp_path_factory.mktemp("processes")
    config = folder / "model.json"
    config.write_text(json.dumps(TOY_CONFIG))
    arguments = SHORT_RUN | {
        "model_config_name_or_path": config,
        "data_files": EMOJI,
        "max_train_samples": IMAGES,
        "resolution": 8,
        "train_batch_size": IMAGES_A_STEP // 2,
        "num_validation_images": 1,
        "validation_num_inference_steps": 1,
        "output_dir": folder / "run",
    }
    first = run_distributed(train, arguments)
    return arguments["output_dir"] / "checkpoint-2", sum(first, [])


@pytest.fixture(autouse=True)
def own_state(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with own_process_state("train_adm"):
        yield


@pytest.mark.parametrize(
    "split",
    [
        {"train_batch_size": 4},
        {"gradient_accumulation_steps": 2},
        {"train_batch_size": 1, "gradient_accumulation_steps": 4},
    ],
)
def test_one_process_goes_on_from_the_right_image(begun, tmp_path, split):
    checkpoint, first = begun
    steps = IMAGES // IMAGES_A_STEP  # to the end of the epoch
    rest = train({"resume_from_checkpoint": checkpoint, "output_dir": tmp_path, "max_train_steps": steps} | split)
    assert len(first) == 2 * IMAGES_A_STEP
    assert len(first + rest) == IMAGES
    assert len(set(first + rest)) == IMAGES  # each once


def test_other_steps_are_refused_by_name(begun, tmp_path, caplog):
    checkpoint, first = begun
    resume = {"resume_from_checkpoint": checkpoint, "output_dir": tmp_path, "max_train_steps": 3}
    message = (
        "the number of processes is 1, and was 2: a step takes 2 images, and took 4 for checkpoint-2.*Start 2 "
        "processes or pass `--train_batch_size 4` to continue as before, or pass `--force_resume`"
    )
    with pytest.raises(ValueError, match=message):
        train(resume)
    for changes in ({"train_batch_size": 3}, {"train_batch_size": 4, "gradient_accumulation_steps": 2}):
        with pytest.raises(ValueError, match="`train_batch_size` is ., and was 2.* for checkpoint-2"):
            train(resume | changes)
    assert not list(tmp_path.iterdir())
    next_images = train(resume | {"force_resume": True})
    assert len(set(first + next_images)) == len(first) + 2
    assert "--force_resume: the number of processes is 1, and was 2" in caplog.text
    # 8 images are no multiple of 3: the third batch has two of them again.
    repeated = train(resume | {"train_batch_size": 3, "force_resume": True, "output_dir": tmp_path / "other"})
    assert len(set(first) & set(repeated)) == 2
    assert "cannot go on after 8 images of the epoch, which 3 does not divide" in caplog.text


def test_a_launcher_tells_the_number_of_processes(begun, tmp_path, monkeypatch):
    checkpoint, _ = begun
    types = load_script("train_adm").ARGUMENT_TYPES
    resume = flags(resume_from_checkpoint=checkpoint, output_dir=tmp_path, max_train_steps=3, train_batch_size=1)
    for number, is_allowed in ((4, True), (2, False), (3, False)):
        monkeypatch.setenv("WORLD_SIZE", str(number))
        if is_allowed:
            _, record = parse_run(types, resume, "train_adm")
            assert record.applied == {"train_batch_size": (2, 1), "max_train_steps": (2, 3)}
        else:
            with pytest.raises(ValueError, match="`train_batch_size` is 1, and was 2 for checkpoint-2"):
                parse_run(types, resume, "train_adm")


def test_contrastive_losses_need_the_same_batches():
    before = StepSplit(num_processes=2, train_batch_size=4, gradient_accumulation_steps=1)
    same_batch, same_step = StepSplit(1, 8, 1), StepSplit(1, 4, 2)
    assert same_batch.has_same_steps(before, "train_clip")
    assert same_batch.has_same_steps(before, "train_adm")
    assert not same_step.has_same_steps(before, "train_clip")
    assert same_step.has_same_steps(before, "train_adm")
