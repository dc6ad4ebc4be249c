"""The classifier's training script as it is used, its metrics against brute force, and what it refuses."""

import json
import logging
import math
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from processes import run_distributed
from runs import (
    CONFIGS,
    EMOJI,
    assert_same_checkpoint,
    flags,
    launch,
    own_process_state,
    read_metrics,
    reset_accelerate,
    save_base,
    write_class_folders,
)
from safetensors.torch import load_file
from scripts import REPOSITORY, load_script
from toy_models import TOY_CLASSIFIER_CONFIG, random_classifier, random_unet

from diffusers_adm import AdaGNClassifierModel, ADMPipeline, LearnedVarianceDDPMScheduler
from diffusers_adm.evaluation.sample.__main__ import main as sample
from diffusers_adm.training import (
    BalancedClassSampler,
    ClassificationMetrics,
    derive_seed,
    load_id2label,
    match_classes,
    parse_args,
    plot_accuracy_by_timestep,
    plot_classifier_curves,
    save_id2label,
    timestep_bin_edges,
)
from diffusers_adm.training import run as training_run
from diffusers_adm.training.classifiers import build_classifier, load_classifier_config


train_classifier = load_script("train_classifier")
RECIPES = sorted(CONFIGS.glob("classifier_*.yaml"))


@pytest.fixture(autouse=True)
def own_state(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with own_process_state("train_classifier"):
        yield


def train(**arguments):
    """One run in this process."""
    reset_accelerate()
    train_classifier.main(flags(**arguments))


def write_model_config(folder, **changes):
    path = folder / "classifier.json"
    config = {k: v for k, v in TOY_CLASSIFIER_CONFIG.items() if k != "num_classes"}
    path.write_text(json.dumps({"_class_name": "AdaGNClassifierModel", **config, **changes}))
    return str(path)


@pytest.fixture
def short(tmp_path):
    """Arguments of a run of two steps on the embedded emoji."""
    return {
        "model_config_name_or_path": write_model_config(tmp_path),
        "data_files": EMOJI,
        "label_column": "label",
        "output_dir": str(tmp_path / "run"),
        "max_train_steps": 2,
        "train_batch_size": 8,
        "lr_warmup_steps": 0,
        "logging_steps": 1,
        "report_to": "none",
    }


# 1. Two processes, started by `accelerate launch`


# 7 timesteps in 3 bins: 0 to 2, 3 and 4, 5 and 6.
NUM_TIMESTEPS, EDGES = 7, [0, 3, 5, 7]
LAUNCHED = {
    "label_column": "label",
    "validation_split": "test",
    "class_balanced": True,
    "random_flip": True,
    "ddpm_num_steps": NUM_TIMESTEPS,
    "num_timestep_bins": 3,
    # 25 labelled images are 3 batches of 4 for each process: 2 optimizer steps an epoch, the second of one batch.
    "train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_train_steps": 7,
    "learning_rate": 1e-2,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
    "checkpointing_steps": 3,
    "logging_steps": 2,
    "validation_steps": 3,
    "use_ema": True,
}


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The finished run, what it printed, and its arguments."""
    folder = tmp_path_factory.mktemp("launched")
    images = folder / "images"
    write_class_folders(images / "train", {"blue": 12, "green": 4, "red": 9})
    write_class_folders(images / "test", {"blue": 3, "red": 4})  # no green: its folders are numbered differently
    Image.new("RGB", (8, 8)).save(images / "train" / "without_label.png")
    arguments = LAUNCHED | {
        "model_config_name_or_path": write_model_config(folder, dropout=0.1),
        "train_data_dir": str(images),
        "output_dir": str(folder / "run"),
    }
    return folder / "run", launch("train_classifier", arguments, folder), arguments


def resume(argv):
    train_classifier.main(argv)


class TestLaunched:
    def test_what_it_prints(self, launched):
        _, output, _ = launched
        assert "Num processes: 2" in output
        assert "25 noisy images in 3 classes at 8 x 8, 7 held-out images, 16 per optimizer step; steps 0 to 7" in output
        assert "1 of 26 images are left out: 1 no label." in output
        assert output.count("Step 3, 7 held-out images: loss") == 1
        assert "Traceback" not in output

    def test_the_classifier_loads_with_the_names_of_its_classes(self, launched):
        folder = launched[0]
        classifier = AdaGNClassifierModel.from_pretrained(folder, subfolder="classifier")
        assert classifier.config.num_classes == 3
        assert classifier(torch.zeros(2, 3, 8, 8), 1).logits.shape == (2, 3)
        assert load_id2label(folder, "classifier") == {0: "blue", 1: "green", 2: "red"}
        scheduler = LearnedVarianceDDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        assert scheduler.config.num_train_timesteps == NUM_TIMESTEPS

    def test_metrics_and_pictures(self, launched):
        rows = read_metrics(launched[0], without=())
        assert [row["step"] for row in rows if "loss" in row] == [2, 3, 4, 6, 7]
        assert [row["step"] for row in rows if "validation_loss" in row] == [3, 6, 7]
        for row in rows:
            prefix = "" if "loss" in row else "validation_"
            assert {f"{prefix}{name}" for name in ("loss", "accuracy", "balanced_accuracy")} <= set(row)
            assert all(np.isfinite(value) for value in row.values())
        for name in ("accuracy_by_timestep.png", "classifier_curves.png"):
            with Image.open(launched[0] / name) as picture:
                picture.load()
                assert min(picture.size) > 400

    def test_accuracy_by_timestep_equals_brute_force(self, launched):
        """One image at a time, noised by the formula; the row is that of two processes and the averaged weights."""
        folder, _, arguments = launched
        classifier = AdaGNClassifierModel.from_pretrained(folder, subfolder="classifier").double()
        alphas_cumprod = np.cumprod(1 - np.linspace(1e-4, 0.02, NUM_TIMESTEPS))
        hits = np.zeros((3, 7))
        losses = np.zeros((3, 7))
        paths = sorted(Path(arguments["train_data_dir"], "test").rglob("*.png"))
        classes = [{"blue": 0, "red": 2}[path.parent.name] for path in paths]
        for index, (path, label) in enumerate(zip(paths, classes, strict=True)):
            image = torch.from_numpy(np.array(Image.open(path)) / 127.5 - 1).permute(2, 0, 1)
            for part in range(3):
                generator = torch.Generator().manual_seed(derive_seed(0, "validation", index, part))
                timestep = int(torch.randint(EDGES[part], EDGES[part + 1], (), generator=generator))
                noise = torch.randn(3, 8, 8, generator=generator).double()
                signal = alphas_cumprod[timestep]
                sample = math.sqrt(signal) * image + math.sqrt(1 - signal) * noise
                with torch.no_grad():
                    log_probs = classifier(sample[None], timestep).logits[0].log_softmax(dim=0)
                losses[part, index] = -log_probs[label]
                hits[part, index] = int(log_probs.argmax()) == label
        blue = np.array(classes) == 0
        expected = {
            "loss": losses.mean(),
            "accuracy": hits.mean(),
            "balanced_accuracy": (hits[:, blue].mean() + hits[:, ~blue].mean()) / 2,
        }
        for part in range(3):
            expected[f"loss_bin{part}"] = losses[part].mean()
            expected[f"accuracy_bin{part}"] = hits[part].mean()
            expected[f"balanced_accuracy_bin{part}"] = (hits[part, blue].mean() + hits[part, ~blue].mean()) / 2
        row = read_metrics(folder)[-1]
        assert row.pop("step") == 7
        # float32 against float64; shares of few images would differ by 1/7 if one image did.
        assert row == pytest.approx({f"validation_{name}": value for name, value in expected.items()}, abs=1e-5)

    def test_tensorboard(self, launched):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(launched[0] / "logs" / "train")).Reload()
        rows = read_metrics(launched[0])
        for logged, name in (("train/accuracy", "accuracy"), ("validation/accuracy_bin1", "validation_accuracy_bin1")):
            values = {event.step: event.value for event in events.Scalars(logged)}
            assert values == pytest.approx({row["step"]: row[name] for row in rows if name in row}, rel=1e-6)

    def test_the_result_is_the_average(self, launched):
        weights = load_file(launched[0] / "classifier" / "diffusion_pytorch_model.safetensors")
        trained = load_file(launched[0] / "checkpoint-7" / "model.safetensors")
        assert sum(not torch.equal(trained[name], weights[name]) for name in trained) > len(trained) / 2

    def test_its_arguments_read_back_as_a_recipe(self, launched):
        folder, _, arguments = launched
        direct = parse_args(train_classifier.ARGUMENT_TYPES, flags(**arguments))
        recipe = ["--config", str(folder / "train_args.yaml")]
        assert parse_args(train_classifier.ARGUMENT_TYPES, recipe) == direct

    @pytest.mark.slow
    def test_resumed_it_ends_bit_by_bit_the_same(self, launched, tmp_path):
        """From the middle of an epoch, on two processes."""
        folder, _, arguments = launched
        changes = {"output_dir": str(tmp_path), "resume_from_checkpoint": str(folder / "checkpoint-3")}
        run_distributed(resume, flags(**arguments | changes))
        assert_same_checkpoint(folder / "checkpoint-7", tmp_path / "checkpoint-7")
        assert read_metrics(tmp_path) == [row for row in read_metrics(folder) if row["step"] > 3]
        name = Path("classifier", "diffusion_pytorch_model.safetensors")
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()


# 2. One process


@pytest.fixture
def seen(monkeypatch):
    """The samples, timesteps and labels that a run trains on."""
    record = SimpleNamespace(samples=[], timesteps=[], labels=[])
    forward, cross_entropy = AdaGNClassifierModel.forward, train_classifier.F.cross_entropy

    def recording_forward(self, sample, timestep, *args, **kwargs):
        if self.training:
            record.samples.append(sample.detach().clone())
            record.timesteps.append(timestep)
        return forward(self, sample, timestep, *args, **kwargs)

    def recording_cross_entropy(logits, labels, **kwargs):
        record.labels.append(labels)
        return cross_entropy(logits, labels, **kwargs)

    monkeypatch.setattr(AdaGNClassifierModel, "forward", recording_forward)
    monkeypatch.setattr(train_classifier.F, "cross_entropy", recording_cross_entropy)
    return record


class TestSingleProcess:
    def test_samples_are_noised_as_the_timestep_says(self, short, seen, tmp_path):
        """x_t of images of one colour c is Gaussian: mean sqrt(abar_t) c, variance 1 - abar_t."""
        write_class_folders(tmp_path / "images", {"dark": 8, "light": 8}, color={"dark": 51, "light": 204})
        arguments = {k: v for k, v in short.items() if k != "data_files"} | {"train_data_dir": str(tmp_path / "images")}
        train(**arguments | {"train_batch_size": 16, "max_train_steps": 16, "logging_steps": 16})
        samples, timesteps = torch.cat(seen.samples).double(), torch.cat(seen.timesteps)
        mean = torch.where(torch.cat(seen.labels) == 0, -0.6, 0.6).double()
        signal = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), dim=0)[timesteps]
        residuals = samples - (signal.sqrt() * mean)[:, None, None, None]
        scaled = residuals / (1 - signal).sqrt()[:, None, None, None]
        # 256 examples of 192 values: standard errors of 0.0045 (mean) and 0.0032 (deviation), 0.016 for each quarter.
        assert abs(scaled.mean()) < 0.02
        assert scaled.std() == pytest.approx(1, abs=0.02)
        for quarter in range(4):
            assert scaled[timesteps // 250 == quarter].std() == pytest.approx(1, abs=0.04)
        assert len(timesteps.unique()) > 200  # 226 expected of 256 uniform draws from 1000
        assert timesteps.double().mean() == pytest.approx(499.5, abs=4 * 1000 / math.sqrt(12 * 256))

    def test_clean_images(self, short, seen, caplog):
        train(**short, noised=False, validation_data_files=EMOJI, max_validation_samples=9)
        assert all(torch.equal(timesteps, torch.zeros(8, dtype=torch.long)) for timesteps in seen.timesteps)
        eight_bit = (torch.cat(seen.samples) + 1) * 127.5
        assert (eight_bit - eight_bit.round()).abs().max() < 1e-4
        folder = Path(short["output_dir"])
        assert not (folder / "scheduler").exists()
        assert not (folder / "accuracy_by_timestep.png").exists()
        assert (folder / "classifier_curves.png").is_file()
        assert set(read_metrics(folder)[-1]) == {
            "step",
            "validation_loss",
            "validation_accuracy",
            "validation_balanced_accuracy",
        }
        assert "9 held-out images: loss" in caplog.text

    @pytest.mark.parametrize("class_balanced", [False, True])
    def test_class_balance(self, short, seen, class_balanced):
        train(**short | {"train_batch_size": 32, "max_train_steps": 5}, class_balanced=class_balanced)
        counts = Counter(torch.cat(seen.labels).tolist())
        assert len(counts) == 9
        if class_balanced:  # 18 or 19 each in an epoch of 163, whose last 3 images fill no batch
            assert 15 <= min(counts.values()) <= max(counts.values()) <= 19
        else:
            assert counts[5] > 70

    def test_it_learns_what_can_be_seen(self, short, tmp_path):
        write_class_folders(tmp_path / "images", {"dark": 16, "light": 16}, color={"dark": 51, "light": 204})
        arguments = {k: v for k, v in short.items() if k != "data_files"} | {"train_data_dir": str(tmp_path / "images")}
        train(
            **arguments | {"train_batch_size": 16, "max_train_steps": 40, "logging_steps": 40, "learning_rate": 1e-2},
            validation_split="train",
            num_timestep_bins=5,
        )
        row = read_metrics(short["output_dir"])[-1]
        assert row["validation_accuracy_bin0"] == 1
        # Where sqrt(abar_t) < 0.07, the mean of 192 values tells the classes apart by little.
        assert row["validation_accuracy_bin4"] < 1
        assert row["validation_loss_bin0"] < 0.1 < row["validation_loss_bin4"]

    def test_a_run_that_failed_is_resumed_exactly(self, short, monkeypatch):
        """In bfloat16 and channels-last, with checkpointed gradients; validated, too."""
        arguments = short | {
            "validation_data_files": EMOJI,
            "max_validation_samples": 9,
            "validation_steps": 3,
            "num_timestep_bins": 2,
            "max_train_steps": 6,
            "train_batch_size": 32,  # 5 batches an epoch
            "checkpointing_steps": 2,
            "mixed_precision": "bf16",
            "channels_last": True,
            "gradient_checkpointing": True,
        }
        folder, other = Path(short["output_dir"]), Path(short["output_dir"] + "-resumed")
        train(**arguments)
        seed_step = training_run.seed_step

        def fail_after_step_5(seed, process_index, micro_step):
            if micro_step == 5:
                raise RuntimeError("the machine is gone")
            seed_step(seed, process_index, micro_step)

        monkeypatch.setattr(training_run, "seed_step", fail_after_step_5)
        with pytest.raises(RuntimeError, match="the machine is gone"):
            train(**arguments | {"output_dir": str(other)})
        monkeypatch.setattr(training_run, "seed_step", seed_step)
        train(**arguments | {"output_dir": str(other), "resume_from_checkpoint": "latest"})
        assert_same_checkpoint(folder / "checkpoint-6", other / "checkpoint-6")
        assert read_metrics(folder) == read_metrics(other)
        assert [row["step"] for row in read_metrics(folder) if "validation_loss" in row] == [3, 6]
        saved = load_file(folder / "classifier" / "diffusion_pytorch_model.safetensors")
        assert {weight.dtype for weight in saved.values()} == {torch.float32}

    def test_validation_in_mixed_precision(self, short, monkeypatch):
        """As training, it computes in bfloat16; near what the saved classifier gives in float32."""
        arguments = {"validation_data_files": EMOJI, "max_validation_samples": 40, "num_timestep_bins": 2}
        short |= {"learning_rate": 1e-2}
        recorded = []
        forward = AdaGNClassifierModel.forward

        def recording_forward(self, *args, **kwargs):
            recorded.append((self.training, torch.is_autocast_enabled("cpu")))
            return forward(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(AdaGNClassifierModel, "forward", recording_forward)
            train(**short | arguments, mixed_precision="bf16")
        assert set(recorded) == {(True, True), (False, True)}
        row = read_metrics(short["output_dir"])[-1]
        still = {k: v for k, v in short.items() if k != "model_config_name_or_path"} | arguments
        still |= {"pretrained_model_name_or_path": short["output_dir"], "learning_rate": 1e-12, "max_train_steps": 1}
        train(**still | {"output_dir": short["output_dir"] + "-float32"})
        expected = read_metrics(short["output_dir"] + "-float32")[-1]
        # bfloat16 has 8 bits; each of 80 noisy images may fall to either side of a tie.
        assert row["validation_loss"] == pytest.approx(expected["validation_loss"], rel=1e-2)
        assert row["validation_loss"] != expected["validation_loss"]
        assert row["validation_accuracy"] == pytest.approx(expected["validation_accuracy"], abs=0.05)

    def test_a_new_run_in_the_folder_of_an_old_one(self, short):
        train(**short)
        with pytest.raises(ValueError, match="holds checkpoint-2 of another run"):
            train(**short)


class TestFineTuning:
    # So small that float32 weights do not change: the result equals the pretrained weights.
    STILL = {"learning_rate": 1e-12}

    def fine_tune(self, short, folder, **arguments):
        arguments = {k: v for k, v in short.items() if k != "model_config_name_or_path"} | self.STILL | arguments
        train(pretrained_model_name_or_path=folder, **arguments)

    def save(self, folder, id2label=None, **config):
        classifier = random_classifier(**{"num_classes": 9, **config})
        classifier.save_pretrained(folder / "classifier")
        LearnedVarianceDDPMScheduler(num_train_timesteps=40).save_pretrained(folder / "scheduler")
        if id2label is not None:
            save_id2label(folder / "classifier", id2label)
        return classifier

    def test_weights_and_chain_are_those_of_the_pretrained_classifier(self, short, tmp_path, caplog):
        classifier = self.save(tmp_path / "base")
        self.fine_tune(short, tmp_path / "base")
        saved = load_file(Path(short["output_dir"], "classifier", "diffusion_pytorch_model.safetensors"))
        for name, weight in saved.items():
            assert torch.allclose(weight, classifier.state_dict()[name], atol=1e-6), name
        scheduler = LearnedVarianceDDPMScheduler.from_pretrained(short["output_dir"], subfolder="scheduler")
        assert scheduler.config.num_train_timesteps == 40
        assert "equal numbers are taken for equal classes" in caplog.text

    def test_what_does_not_fit(self, short, tmp_path):
        self.save(tmp_path / "base", num_classes=4)
        with pytest.raises(ValueError, match="The data has 9 class.*, the pretrained classifier has 4 and names none"):
            self.fine_tune(short, tmp_path / "base")
        self.save(tmp_path / "other")
        with pytest.raises(ValueError, match="The resolution is 16; the .* attention pool is for 8"):
            self.fine_tune(short, tmp_path / "other", resolution=16)
        with pytest.raises(ValueError, match="`pretrained_model_name_or_path` is .*is no file or folder here and"):
            self.fine_tune(short, tmp_path / "nowhere")


# 3. Recipes


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_each_recipe_parses_and_its_network_builds(recipe, monkeypatch):
    monkeypatch.chdir(REPOSITORY)  # their paths are relative to it
    model, data, noise, training = parse_args(train_classifier.ARGUMENT_TYPES, ["--config", str(recipe)])
    model.check_source()
    config = load_classifier_config(model, data)
    with torch.device("meta"):
        classifier = build_classifier(model, data, config, dict.fromkeys(range(9), ""))
    assert classifier.config.num_classes == 9
    assert bool(noise.given()) == training.noised
    for path in (*data.data_files, *data.validation_data_files):
        assert Path(path).is_file()


# 4. What is refused, and when: before the first step


class TestBadInput:
    @pytest.fixture(autouse=True)
    def no_training(self, monkeypatch):
        def fail(*args, **kwargs):
            pytest.fail("training began")

        monkeypatch.setattr(training_run, "seed_step", fail)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"label_column": "none"}, "A classifier is trained on labelled images. Name their column"),
            ({"label_column": "category"}, "`label_column` is 'category', but .* has the columns image, text, label"),
            ({"pretrained_model_name_or_path": "some/where"}, "Pass either `--model_config_name_or_path`"),
            ({"noised": False, "ddpm_num_steps": 10}, "there is no noise to describe: drop num_train_timesteps"),
            ({"num_timestep_bins": 0}, "`num_timestep_bins` is 0; it must be at least 1"),
            ({"ddpm_num_steps": 5}, "`num_timestep_bins` is 10; it must lie in .1, 5."),
            ({"validation_steps": 0}, "`validation_steps` is 0; it must be at least 1"),
            ({"max_validation_samples": 3}, "`max_validation_samples` was given without `validation_data_files`"),
            ({"validation_data_files": EMOJI, "validation_split": "test"}, "The data have no split 'test'"),
            ({"resolution": 9}, "`sample_size` is 9; .* divisible by 2"),
            ({"train_batch_size": 164}, "There are 163 usable images, but one step takes 164"),
        ],
    )
    def test_arguments(self, short, changes, message):
        with pytest.raises(ValueError, match=message):
            train(**short | changes)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"num_classes": 4}, "The data has 9 classes; `num_classes` in the config is 4"),
            ({"in_channels": 1}, "The network has 1 channel.*RGB images.*`--image_mode L`"),
            ({"_class_name": "AdaGNUNet2DModel"}, "is the config of `AdaGNUNet2DModel`; this script trains"),
            (
                {"num_class": 9},
                "'num_class', which is no argument of `AdaGNClassifierModel`. Did you mean `num_classes`",
            ),
        ],
    )
    def test_models(self, short, tmp_path, config, message):
        short["model_config_name_or_path"] = write_model_config(tmp_path, **config)
        with pytest.raises(ValueError, match=message):
            train(**short)

    def test_data(self, short, tmp_path):
        del short["data_files"]
        write_class_folders(tmp_path / "one" / "train", {"cats": 8})
        with pytest.raises(ValueError, match="All 8 usable images are of one class"):
            train(**short, train_data_dir=tmp_path / "one")
        write_class_folders(tmp_path / "two" / "train", {"cats": 8, "dogs": 8})
        write_class_folders(tmp_path / "two" / "test", {"cats": 8, "owls": 8})
        with pytest.raises(ValueError, match="'owls' cannot be matched by name"):
            train(**short, train_data_dir=tmp_path / "two", validation_split="test")


# 5. The parts


class ToyDataset:
    def __init__(self, length, seed=0):
        self.length, self.seed, self.epoch = length, seed, 0

    def __len__(self):
        return self.length


class TestBalancedClassSampler:
    def test_classes_come_equally_often_and_images_in_turn(self):
        labels = [0] * 60 + [2] * 5 + [3] * 38  # class 1 has no image
        dataset = ToyDataset(len(labels))
        sampler = BalancedClassSampler(dataset, labels)
        epochs = []
        for dataset.epoch in range(20):
            drawn = list(sampler)
            assert len(drawn) == len(sampler) == 103
            assert sorted(Counter(labels[index] for index in drawn).values()) == [34, 34, 35]
            counts = Counter(drawn)
            assert {counts[index] for index in range(60, 65)} <= {6, 7}  # 34 or 35 draws of 5 images
            assert {counts[index] for index in range(60)} == {0, 1}
            epochs.append(tuple(drawn))
        assert len(set(epochs)) == 20
        assert set(range(103)) == set().union(*epochs)
        # In random order: the mean position of a class is that of all, within three standard errors.
        positions = [place for epoch in epochs for place, index in enumerate(epoch) if labels[index] == 2]
        assert np.mean(positions) == pytest.approx(51, abs=3 * 30 / math.sqrt(len(positions)))

    def test_seed_and_epoch_alone_decide(self):
        labels = [0, 1, 1, 1, 1]
        dataset = ToyDataset(5)
        first = list(BalancedClassSampler(dataset, labels))
        torch.rand(1)
        assert list(BalancedClassSampler(dataset, labels)) == first
        draws = {tuple(BalancedClassSampler(ToyDataset(5, seed), labels)) for seed in range(5)}
        assert len(draws) > 1

    def test_labels_of_another_dataset(self):
        with pytest.raises(ValueError, match="Got 3 labels for 5 examples"):
            BalancedClassSampler(ToyDataset(5), [0, 1, 1])


@pytest.mark.parametrize(("num_timesteps", "num_bins"), [(1000, 10), (7, 3), (10, 10), (25, 4), (1, 1)])
def test_bins_are_as_equal_as_can_be(num_timesteps, num_bins):
    edges = timestep_bin_edges(num_timesteps, num_bins)
    assert (edges[0], edges[-1], len(edges)) == (0, num_timesteps, num_bins + 1)
    assert set(np.diff(edges)) <= {num_timesteps // num_bins, -(-num_timesteps // num_bins)}


class Alone:
    """One process: a sum over processes is the sum."""

    @staticmethod
    def reduce(tensor, reduction):
        assert reduction == "sum"
        return tensor


def test_metrics_equal_brute_force():
    generator = torch.Generator().manual_seed(0)
    metrics = ClassificationMetrics(NUM_TIMESTEPS, 4, 3)
    rows = []
    for size in (5, 40, 1):
        timesteps = torch.randint(0, NUM_TIMESTEPS, (size,), generator=generator)
        labels = torch.randint(0, 3, (size,), generator=generator)  # class 3 never occurs
        logits, losses = torch.randn(size, 4, generator=generator), torch.rand(size, generator=generator)
        metrics.update(timesteps, logits, labels, losses)
        rows += list(zip(timesteps.tolist(), labels.tolist(), logits.tolist(), losses.tolist(), strict=True))
    expected = {}
    for suffix, timesteps in {"": range(7), "_bin0": (0, 1, 2), "_bin1": (3, 4), "_bin2": (5, 6)}.items():
        chosen = [(label, int(np.argmax(logits)), loss) for t, label, logits, loss in rows if t in timesteps]
        recalls = [
            np.mean([answer == label for label, answer, _ in chosen if label == this])
            for this in {label for label, _, _ in chosen}
        ]
        expected[f"loss{suffix}"] = np.mean([loss for _, _, loss in chosen])
        expected[f"accuracy{suffix}"] = np.mean([answer == label for label, answer, _ in chosen])
        expected[f"balanced_accuracy{suffix}"] = np.mean(recalls)
    assert metrics.compute(Alone()) == pytest.approx(expected, rel=1e-6)
    metrics.reset()
    assert metrics.compute(Alone()) == {}


@pytest.mark.draws
def test_pictures_with_gaps(tmp_path):
    """A bin without images, and a run without validation."""
    edges = timestep_bin_edges(10, 2)
    path = plot_accuracy_by_timestep({"accuracy_bin1": 0.5}, edges, tmp_path / "a.png", "no images", [0.5, 0.5, 0])
    assert Image.open(path).size[0] > 400
    rows = [{"step": 1, "loss": math.nan}, {"step": 2, "loss": 1.0, "accuracy": 0.5}]
    assert Image.open(plot_classifier_curves(rows, tmp_path / "b.png")).size[0] > 400


def test_names_of_classes(tmp_path):
    assert load_id2label(tmp_path) is None
    save_id2label(tmp_path / "classifier", {0: "Übung", 10: "b"})
    assert load_id2label(tmp_path, "classifier") == load_id2label(tmp_path / "classifier") == {0: "Übung", 10: "b"}


def test_classes_of_the_same_names():
    known = {0: "a", 1: "b", 2: "c"}
    for by_number in (False, True):
        assert match_classes({0: "b", 1: "c"}, known, by_number=by_number) == {0: 1, 1: 2}
        assert match_classes({5: "c", 3: "a"}, {"0": "a", "1": "b", "2": "c"}, 7, by_number=by_number) == {5: 2, 3: 0}
        assert match_classes({0: "a", 1: "a"}, {0: "a", 1: "a"}, by_number=by_number) == {0: 0, 1: 1}
    with pytest.raises(ValueError, match="has 1 classes, but 'd' cannot be matched by name: the model names 'a'"):
        match_classes({0: "d"}, {0: "a"})
    with pytest.raises(ValueError, match="a class 'a', but classes 0 and 2 of the model both have this name"):
        match_classes({0: "a", 1: "b"}, {0: "a", 1: "c", 2: "a", 3: "b"})


def test_classes_of_other_names(caplog):
    """By number, and not from 0 on."""
    with caplog.at_level(logging.WARNING):
        assert match_classes({1: "d", 2: "e"}, None, 2, by_number=True) == {1: 1, 2: 2}
    assert "names no classes" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert match_classes({1: "d", 2: "e"}, {1: "a", 2: "b"}, 2, by_number=True) == {1: 1, 2: 2}
    assert "The data has the classes 'd', 'e'. The model names 'a', 'b'. Equal numbers" in caplog.text
    # With one name in common, numbers say nothing: this would take "a" for "b".
    with pytest.raises(ValueError, match="2 classes and the network 2, but 'd' cannot be .* names 'a', 'b'"):
        match_classes({0: "d", 1: "a"}, {0: "a", 1: "b"}, 2, by_number=True)
    with pytest.raises(ValueError, match="2 classes and the network 3, but 'd' cannot be matched by name"):
        match_classes({1: "d", 2: "b"}, {1: "a", 2: "b"}, 3, by_number=True)
    with pytest.raises(ValueError, match="2 classes and the network 3, .*: the model names no classes"):
        match_classes({1: "d", 2: "b"}, None, 3, by_number=True)


# 6. The noise schedule that it was trained on


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a short run on the cosine schedule."""
    folder = tmp_path_factory.mktemp("trained")
    arguments = {"data_files": EMOJI, "label_column": "label", "max_train_steps": 2, "train_batch_size": 8}
    arguments |= {"lr_warmup_steps": 0, "report_to": "none", "ddpm_beta_schedule": "cosine"}
    with pytest.MonkeyPatch.context() as patch, own_process_state("train_classifier"):
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(train_classifier, "plot_classifier_curves", lambda *args: None)  # slow
        train(**arguments, model_config_name_or_path=write_model_config(folder), output_dir=str(folder / "run"))
    return folder / "run"


class TestNoiseSchedule:
    """A trained classifier with models of the same and of another noise schedule."""

    ANOTHER = (
        r"(?s)`classifier` was trained on the noise schedule squaredcos_cap_v2 with 1000 timesteps, but `scheduler`.*"
        r"linear from 0.0001 to 0.02 with 1000 timesteps"
    )

    def pipeline(self, trained, schedule):
        return ADMPipeline(
            unet=random_unet(),
            scheduler=LearnedVarianceDDPMScheduler(beta_schedule=schedule),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            classifier=AdaGNClassifierModel.from_pretrained(trained, subfolder="classifier"),
        )

    def test_it_steers_a_model_of_its_own_schedule_alone(self, trained):
        pipe = self.pipeline(trained, "cosine")
        guidance = {"class_labels": 1, "classifier_guidance_scale": 1.0, "num_inference_steps": 2}
        pipe(**guidance)
        with pytest.raises(ValueError, match=self.ANOTHER):
            self.pipeline(trained, "linear")
        pipe.scheduler = LearnedVarianceDDPMScheduler()
        with pytest.raises(ValueError, match=self.ANOTHER):
            pipe(**guidance)

    @pytest.mark.parametrize("is_older", [False, True])
    def test_by_the_sampling_command(self, trained, tmp_path, is_older):
        """Also a folder written before classifiers carried their schedule: its scheduler is used."""
        folder = shutil.copytree(trained, tmp_path / "run")
        if is_older:
            config = json.loads((folder / "classifier" / "config.json").read_text())
            config.pop("noise_schedule", None)
            (folder / "classifier" / "config.json").write_text(json.dumps(config))
        arguments = {"num_images": 1, "classifier": str(folder), "classifier_guidance_scale": 2, "class_labels": 1}
        arguments |= {"num_inference_steps": 2, "output_dir": str(tmp_path / "samples")}
        for schedule in ("cosine", "linear"):
            model = save_base(tmp_path / schedule, random_unet(), beta_schedule=schedule)
            reset_accelerate()
            if schedule == "linear":
                with pytest.raises(ValueError, match=self.ANOTHER):
                    sample(flags(**arguments | {"output_dir": str(tmp_path / "other")}, model=model))
            else:
                sample(flags(**arguments, model=model))

    @pytest.mark.parametrize("noised", [True, False])
    def test_a_classifier_that_is_trained_on_with_other_noise(self, short, trained, noised, caplog):
        """It names the noise schedule of the latest training; a change is logged."""
        del short["model_config_name_or_path"]
        other = {"ddpm_num_steps": 40} if noised else {"noised": False}
        train(**short, pretrained_model_name_or_path=str(trained), **other)
        classifier = AdaGNClassifierModel.from_pretrained(short["output_dir"], subfolder="classifier")
        expected = {"num_train_timesteps": 40, "beta_schedule": "squaredcos_cap_v2"} if noised else {}
        assert classifier.config.noise_schedule == expected
        assert "The config of the classifier named the noise schedule squaredcos_cap_v2 with 1000" in caplog.text
        assert f"the noise schedule {'squaredcos_cap_v2 with 40' if noised else 'of clean images'}" in caplog.text
        if not noised:
            with pytest.raises(ValueError, match="`classifier` was trained on clean images, so it cannot be used"):
                self.pipeline(Path(short["output_dir"]), "cosine")

    def test_the_same_noise_under_another_name_is_no_change(self, short, trained, tmp_path, caplog):
        folder = shutil.copytree(trained, tmp_path / "other")
        scheduler = LearnedVarianceDDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        betas = scheduler.betas.tolist()
        LearnedVarianceDDPMScheduler(trained_betas=betas).save_pretrained(folder / "scheduler")
        del short["model_config_name_or_path"]
        train(**short, pretrained_model_name_or_path=str(folder))
        classifier = AdaGNClassifierModel.from_pretrained(short["output_dir"], subfolder="classifier")
        assert classifier.config.noise_schedule == {"num_train_timesteps": 1000, "trained_betas": betas}
        assert "named the noise schedule" not in caplog.text
        self.pipeline(Path(short["output_dir"]), "cosine")
