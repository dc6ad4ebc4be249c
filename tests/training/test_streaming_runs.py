"""Training on streamed data, and on images that are not checked before: whole runs, resumed ones, and refusals."""

import json
import multiprocessing
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
from processes import kill_distributed, run_distributed
from runs import (
    SHORT_RUN,
    assert_same_checkpoint,
    flags,
    own_process_state,
    read_metrics,
    reset_accelerate,
    write_class_folders,
)
from scripts import load_script
from shards import CLASSES, stream_arguments, write_shards
from toy_models import (
    TEXT_CONFIGS,
    TOY_AUTOENCODER_CONFIG,
    TOY_CLASSIFIER_CONFIG,
    TOY_CONFIG,
    random_text_encoder,
    toy_tokenizer,
)

from diffusers_adm.training import run as training_run
from diffusers_adm.training.resume import Checkpoint, RunRecord


train_adm = load_script("train_adm")
SIZES = [5, 9, 0, 3, 7]  # 24 rows
OTHER_CONFIGS = {
    "train_classifier": {**TOY_CLASSIFIER_CONFIG, "num_classes": 3},
    "train_autoencoder": TOY_AUTOENCODER_CONFIG,
}


@pytest.fixture(autouse=True)
def own_state(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(training_run, "plot_loss_curves", lambda *args: None)  # slow, and tested elsewhere
    with own_process_state("train_adm"):
        yield


def write_unet(folder, **changes):
    path = folder / "unet.json"
    path.write_text(json.dumps({**TOY_CONFIG, **changes}))
    return str(path)


def arguments_of(tmp_path, pattern, **changes):
    if "model_config_name_or_path" not in changes:
        changes["model_config_name_or_path"] = write_unet(tmp_path)
    return SHORT_RUN | {
        **stream_arguments(pattern),
        "caption_column": "none",
        "label_column": "none",
        "streaming": True,
        "shuffle_buffer_size": 4,
        "cache_dir": str(tmp_path / "cache"),
        "train_batch_size": 2,
        "output_dir": str(tmp_path / "run"),
        **changes,
    }


def train(name="train_adm", **arguments):
    reset_accelerate()
    load_script(name).main(flags(**arguments))


def continue_from(folder, other, step):
    """A copy of the run as it was after `step`."""
    shutil.copytree(Path(folder, f"checkpoint-{step}"), Path(other, f"checkpoint-{step}"))
    rows = Path(folder, "metrics.jsonl").read_text().splitlines(keepends=True)
    Path(other, "metrics.jsonl").write_text("".join(rows[:step]))
    return {"output_dir": str(other), "resume_from_checkpoint": "latest"}


# 1. Runs


def test_classes_and_captions_of_tars_are_trained_and_resumed_bit_by_bit(tmp_path, caplog):
    pattern = write_shards(tmp_path / "shards", SIZES, "tar", faulty={7})
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    random_text_encoder("clip").save_pretrained(tmp_path / "text" / "text_encoder")
    toy_tokenizer("clip").save_pretrained(tmp_path / "text" / "tokenizer")
    arguments = arguments_of(
        tmp_path,
        pattern,
        **{name: value for name, value in stream_arguments(pattern).items() if name != "data_files"},
        model_config_name_or_path=write_unet(tmp_path, **TEXT_CONFIGS["added_kv"]),
        class_names=str(tmp_path / "classes.txt"),
        text_encoder_name_or_path=str(tmp_path / "text"),
        random_flip=True,
        train_batch_size=4,
        max_train_steps=8,  # an epoch has 6
        checkpointing_steps=4,
    )
    train(**arguments)
    assert "24 images in 5 shards in 3 classes with captions at 8 x 8" in caplog.text
    assert "Left out as they were met: 1 image: 1 unreadable." in caplog.text
    assert "unreadable\trow 2 of 001.tar (00007.png)\t" in (tmp_path / "run" / "skipped_images.txt").read_text()
    facts = json.loads((tmp_path / "run" / "checkpoint-8" / "run_record.json").read_text())["facts"]
    assert (facts["stream"]["rows"], facts["stream_processes"], facts["stream_lanes"]) == (24, 1, 1)
    assert facts["classes"] == CLASSES
    assert "num_images" not in facts

    train(**arguments | continue_from(tmp_path / "run", tmp_path / "resumed", 4))
    assert_same_checkpoint(tmp_path / "run" / "checkpoint-8", tmp_path / "resumed" / "checkpoint-8")
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "resumed")


def train_and_note(argv, notes):
    """A run that writes the ids of each batch, with the number of batches before, to a file of its process."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # workers need not import everything again
    batches = training_run.TrainingRun.batches

    def noted(run):
        for batch in batches(run):
            ids = ((batch["images"][:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
            with open(Path(notes, f"{run.accelerator.process_index}.jsonl"), "a") as file:
                file.write(json.dumps([run.progress.micro_step - 1, ids]) + "\n")
            yield batch

    training_run.TrainingRun.batches = noted
    training_run.plot_loss_curves = lambda *args: None
    load_script("train_adm").main(argv)


def noted_ids(notes):
    """The ids of each batch of each process, which must be the same if a batch was read again."""
    found = []
    for process in range(2):
        by_batch = {}
        for line in Path(notes, f"{process}.jsonl").read_text().splitlines():
            number, ids = json.loads(line)
            assert by_batch.setdefault(number, ids) == ids
        assert sorted(by_batch) == list(range(len(by_batch)))
        found.append([by_batch[number] for number in range(len(by_batch))])
    return found


@pytest.mark.slow
def test_two_processes_with_two_workers_read_each_image_once_also_across_a_kill(tmp_path):
    pattern = write_shards(tmp_path / "shards", [9, 14, 3, 7, 16])  # 49 rows: 6 batches of each process
    arguments = arguments_of(
        tmp_path, pattern, dataloader_num_workers=2, train_batch_size=4, max_train_steps=8, checkpointing_steps=2
    )
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    run_distributed(train_and_note, flags(**arguments), str(tmp_path / "whole"))

    broken = arguments | {"output_dir": str(tmp_path / "resumed"), "resume_from_checkpoint": "latest"}

    def has_begun():
        return (tmp_path / "resumed" / "checkpoint-2").exists()

    kill_distributed(train_and_note, flags(**broken), str(tmp_path / "broken"), once=has_begun, within=0.2)
    run_distributed(train_and_note, flags(**broken), str(tmp_path / "broken"))

    whole = noted_ids(tmp_path / "whole")
    assert whole == noted_ids(tmp_path / "broken")
    for epoch, number in ((slice(0, 6), 48), (slice(6, 8), 16)):
        seen = Counter(image for process in whole for ids in process[epoch] for image in ids)
        assert len(seen) == sum(seen.values()) == number
    assert_same_checkpoint(tmp_path / "run" / "checkpoint-8", tmp_path / "resumed" / "checkpoint-8")


@pytest.mark.parametrize(
    "script, channels, changes",
    [
        ("train_adm", 7, {"task": "inpaint"}),
        ("train_super_resolution", 6, {"low_res_size": 4}),
        ("train_controlnet", 3, {"condition": "edges"}),
    ],
)
def test_other_scripts_that_share_the_data_can_stream(tmp_path, script, channels, changes):
    pattern = write_shards(tmp_path / "shards", SIZES)
    unet = write_unet(tmp_path, in_channels=channels)
    arguments = arguments_of(tmp_path, pattern, model_config_name_or_path=unet, **changes)
    if script == "train_controlnet":
        train(**arguments_of(tmp_path, pattern))
        arguments |= {"pretrained_model_name_or_path": str(tmp_path / "run"), "output_dir": str(tmp_path / "control")}
        del arguments["model_config_name_or_path"]
    train(script, **arguments)
    assert len(read_metrics(arguments["output_dir"])) == 2


@pytest.mark.parametrize("script", ["train_adm", "train_super_resolution", "train_classifier", "train_autoencoder"])
def test_images_that_were_not_checked_before_are_left_out_as_they_are_met(tmp_path, script, caplog, monkeypatch):
    folder = write_class_folders(tmp_path / "images", {"cat": 4, "dog": 4})
    Path(folder, "cat", "00.png").write_bytes(b"no image")
    small = write_class_folders(tmp_path / "small", {"fox": 1}, size=(3, 3))
    shutil.copytree(Path(small, "fox"), Path(folder, "fox"))
    arguments = SHORT_RUN | {
        "model_config_name_or_path": write_unet(tmp_path, in_channels=3 if script == "train_adm" else 6),
        "train_data_dir": folder,
        "label_column": "label",
        "no_check_images": True,
        "max_train_steps": 3,
        "train_batch_size": 3,
        "output_dir": str(tmp_path / "run"),
        "cache_dir": str(tmp_path / "cache"),
        **({"low_res_size": 4} if script == "train_super_resolution" else {}),
    }
    if script in OTHER_CONFIGS:
        (tmp_path / "unet.json").write_text(json.dumps(OTHER_CONFIGS[script]))
    if script == "train_classifier":
        monkeypatch.setattr(load_script(script), "plot_classifier_curves", lambda *args: None)
        for name in ("num_validation_images", "validation_num_inference_steps"):
            del arguments[name]
    if script == "train_autoencoder":
        for name in ("label_column", "validation_num_inference_steps"):
            del arguments[name]
    train(script, **arguments)
    assert "Left out as they were met: 2 images" in caplog.text
    report = (tmp_path / "run" / "skipped_images.txt").read_text()
    assert {line.split("\t")[0] for line in report.splitlines()} == {"unreadable", "too small"}
    assert json.loads((tmp_path / "run" / "checkpoint-3" / "run_record.json").read_text())["facts"]["num_images"] == 9


# 2. Refusals


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"max_train_samples": 5}, "`max_train_samples` is 5, and `streaming` does not read the data"),
        ({"value_range": ["auto"]}, "`value_range` is .'auto'., and `streaming` does not read"),
        ({"class_balanced": True, "label_column": "label"}, "`class_balanced` is True, and `streaming`"),
        ({"data_files": "none", "train_data_dir": "here"}, "`train_data_dir` is 'here', and `streaming`"),
        ({"streaming": False}, "`shuffle_buffer_size` was given without `streaming`"),
        (
            {"streaming": False, "shuffle_buffer_size": "none", "class_names": "x", "label_column": "l"},
            "`class_names` w",
        ),
        ({"shuffle_buffer_size": 0}, "`shuffle_buffer_size` is 0; it must be at least 1"),
        (
            {"label_column": "label", "class_names": "missing.txt"},
            "`class_names` is 'missing.txt', which cannot be read",
        ),
    ],
)
def test_arguments_that_need_all_data_before_are_refused(tmp_path, changes, sentence):
    pattern = write_shards(tmp_path / "shards", [3])
    with pytest.raises(ValueError, match=sentence):
        train(**arguments_of(tmp_path, pattern, **changes))


def test_captions_cannot_be_encoded_before(tmp_path):
    pattern = write_shards(tmp_path / "shards", [3])
    random_text_encoder("clip").save_pretrained(tmp_path / "text" / "text_encoder")
    toy_tokenizer("clip").save_pretrained(tmp_path / "text" / "tokenizer")
    arguments = arguments_of(
        tmp_path,
        pattern,
        model_config_name_or_path=write_unet(tmp_path, **TEXT_CONFIGS["added_kv"]),
        caption_column="text",
        text_encoder_name_or_path=str(tmp_path / "text"),
        precompute_text_embeddings=True,
    )
    with pytest.raises(ValueError, match="`precompute_text_embeddings` encodes all captions before"):
        train(**arguments)


def resumed_record(**facts):
    return RunRecord("train_adm", Checkpoint(Path("checkpoint-3"), "train_adm", {}, facts))


def test_other_shards_processes_and_workers_are_refused_by_name():
    source = {"shards": 2, "rows": 9, "hash": "a"}
    facts = {"stream": source, "stream_processes": 2, "stream_lanes": 4}
    for workers in (0, 1, 2, 4):
        record = resumed_record(**facts)
        assert record.check_stream(source, 2, workers) == record.facts["stream_lanes"] == 4
    with pytest.raises(ValueError, match="`rows` of the streamed data is 8, and was 9 for checkpoint-3"):
        resumed_record(**facts).check_stream({**source, "rows": 8}, 2, 4)
    with pytest.raises(ValueError, match="processes that share the streamed data is 3, and was 2.* Start 2 processes"):
        resumed_record(**facts).check_stream(source, 3, 4)
    with pytest.raises(ValueError, match="`dataloader_num_workers` is 3, and was 4.*Pass 0 or one of 1, 2, 4"):
        resumed_record(**facts).check_stream(source, 2, 3)
    forced = resumed_record(**facts)
    forced.force = True
    assert forced.check_stream({**source, "rows": 8}, 3, 3) == 3
    assert RunRecord("train_adm").check_stream(source, 1, 0) == 1
