"""training/train_image_to_image.py: pairs of each kind, the inputs of the network, short runs, and what is refused."""

import json
import logging
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from runs import (
    CONFIGS,
    SHORT_RUN,
    assert_same_checkpoint,
    flags,
    launch,
    own_process_state,
    read_metrics,
    reset_accelerate,
    save_base,
)
from safetensors.torch import load_file
from scripts import REPOSITORY, load_script
from toy_models import TOY_CONFIG, random_unet

from diffusers_adm import ADMImageToImagePipeline
from diffusers_adm.conditioning.made_sources import grayscale
from diffusers_adm.training import parse_args
from diffusers_adm.training import run as training_run


RECIPES = [CONFIGS / f"{name}.yaml" for name in ("noto_to_twemoji_32", "emoji_32_colorize")]
NUMBER = 24
train_image_to_image = load_script("train_image_to_image")


@pytest.fixture(autouse=True)
def own_state(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(training_run, "plot_loss_curves", lambda *args: None)  # slow, and tested elsewhere
    with own_process_state("train_image_to_image"):
        yield


def train(**arguments):
    reset_accelerate()
    train_image_to_image.main(flags(**arguments))


def target(index):
    """An image whose colours tell its number."""
    generator = np.random.default_rng(index)
    return Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))


def source(index):
    """Its source: the colours inverted."""
    return Image.fromarray(255 - np.asarray(target(index)))


def write_parquet(path, order=range(NUMBER), **makers):
    columns = {name: [make(index) for index in order] for name, make in makers.items()}
    features = {
        name: datasets.Image() if isinstance(values[0], Image.Image) else None for name, values in columns.items()
    }
    features = {name: kind or datasets.Value("string") for name, kind in features.items()}
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(path)
    return str(path)


def write_folder(path, make, order=range(NUMBER)):
    path.mkdir()
    for index in order:
        make(index).save(path / f"{index:02d}.png")
    return str(path)


def write_model_config(folder, **changes):
    path = folder / "model.json"
    path.write_text(json.dumps({**TOY_CONFIG, "in_channels": 6, **changes}))
    return str(path)


def key(index):
    return f"key {index}"


def label(index):
    return ("round", "square")[index % 2]


@pytest.fixture
def short(tmp_path):
    """Arguments of a run of two steps, without source images."""
    return SHORT_RUN | {
        "model_config_name_or_path": write_model_config(tmp_path),
        "data_files": write_parquet(tmp_path / "images.parquet", image=target, source=source, key=key, label=label),
        "source_dropout_prob": 0,
        "output_dir": str(tmp_path / "run"),
    }


@pytest.fixture
def seen(monkeypatch):
    """`(images, extra channels, keyword arguments of the network)` of each step."""
    steps = []
    training_losses = train_image_to_image.training_losses

    def record(unet, scheduler, images, timesteps, *, extra_channels, model_kwargs, **kwargs):
        steps.append((images, extra_channels, model_kwargs))
        arguments = {"extra_channels": extra_channels, "model_kwargs": model_kwargs, **kwargs}
        return training_losses(unet, scheduler, images, timesteps, **arguments)

    monkeypatch.setattr(train_image_to_image, "training_losses", record)
    return steps


# 1. Pairs


class TestPairs:
    def check(self, seen, folder, number=2):
        """Every source is its target inverted, cropped and flipped alike."""
        assert len(seen) == number
        for images, extra_channels, _ in seen:
            torch.testing.assert_close(extra_channels, -images, rtol=0, atol=1e-6)
        pipe = ADMImageToImagePipeline.from_pretrained(folder)
        assert (pipe.source_format.mode, pipe.sample_channels, pipe.config.source_dropout_prob) == ("RGB", 3, 0)

    def test_of_a_second_column(self, short, seen):
        train(**short, source_column="source", random_flip=True)
        self.check(seen, short["output_dir"])

    def test_of_other_files(self, short, seen, tmp_path, caplog):
        """In another order, and not all of them."""
        order = [*range(NUMBER - 1, 2, -1), NUMBER + 5]
        files = write_parquet(tmp_path / "others.parquet", order, image=source, key=key)
        with caplog.at_level(logging.WARNING):
            train(**short, source_data_files=files, pair_column="key")
        self.check(seen, short["output_dir"])
        assert f"3 of {NUMBER} target images" in caplog.text
        assert "'key 0', 'key 1', 'key 2'" in caplog.text
        assert f"1 of {NUMBER - 2} source images" in caplog.text

    def test_of_another_column_of_other_files(self, short, seen, tmp_path):
        files = write_parquet(tmp_path / "others.parquet", picture=source, key=key)
        train(**short, source_data_files=files, source_column="picture", pair_column="key")
        self.check(seen, short["output_dir"])

    def test_of_a_second_folder(self, short, seen, tmp_path):
        short.pop("data_files")
        folders = {"train_data_dir": write_folder(tmp_path / "targets", target)}
        train(**short, **folders, source_data_dir=write_folder(tmp_path / "sources", source))
        self.check(seen, short["output_dir"])


class TestMadeSources:
    def test_grey(self, short, seen, tmp_path):
        config = {"model_config_name_or_path": write_model_config(tmp_path, in_channels=4)}
        train(**short | config, source="grayscale", random_flip=True)
        for images, extra_channels, _ in seen:
            expected = torch.stack([grayscale(image / 2 + 0.5) for image in images])
            torch.testing.assert_close(extra_channels, 2 * expected - 1, rtol=0, atol=1e-6)
        pipe = ADMImageToImagePipeline.from_pretrained(short["output_dir"])
        assert (pipe.source_format.mode, pipe.sample_channels) == ("L", 3)
        picture = target(0).convert("L")
        assert pipe(picture, num_inference_steps=1).images[0].mode == "RGB"

    def test_noise(self, short, seen):
        train(**short, source="noise")
        for images, extra_channels, _ in seen:
            noise = (extra_channels - images).flatten(1)
            assert (noise.std(dim=1) > 0.05).all()
            both = torch.cat([extra_channels.flatten(1), images.flatten(1)])
            assert (torch.corrcoef(both).diagonal(len(images)) > 0.2).all()

    def test_blocks_of_colour(self, short, seen):
        train(**short, source="low_resolution")
        assert all(extra_channels.shape == images.shape for images, extra_channels, _ in seen)

    def test_dropout(self, short, seen):
        train(**short | {"source_dropout_prob": 1}, source_column="source")
        assert all(not extra_channels.any() for _, extra_channels, _ in seen)
        pipe = ADMImageToImagePipeline.from_pretrained(short["output_dir"])
        assert pipe.config.source_dropout_prob == 1


# 2. Runs


def test_by_class_guided_and_resumed(short, tmp_path):
    by_class = short | {"label_column": "label", "source_column": "source", "checkpointing_steps": 2}
    by_class |= {"validation_guidance_scale": 2.0, "source_dropout_prob": 0.5}
    train(**by_class | {"max_train_steps": 4})
    folder = Path(by_class["output_dir"])
    pipe = ADMImageToImagePipeline.from_pretrained(folder)
    assert pipe.id2label == {0: "round", 1: "square"}
    arguments = {"class_labels": "round", "guidance_scale": 2.0, "num_inference_steps": 2, "output_type": "pt"}
    assert pipe(torch.rand(1, 3, 8, 8), **arguments).images.shape == (1, 3, 8, 8)
    # Two strips of input, sample and target, each image eight times as large.
    with Image.open(folder / "samples-0000004.png") as grid:
        assert grid.width == 2 + 3 * (64 + 2)

    other = by_class | {"output_dir": str(tmp_path / "resumed")}
    train(**other)
    train(**other | {"max_train_steps": 4, "resume_from_checkpoint": "latest"})
    assert_same_checkpoint(folder / "checkpoint-4", Path(other["output_dir"]) / "checkpoint-4")


def test_guidance_of_validation_images_needs_dropout(short):
    guided = short | {"validation_guidance_scale": 2.0, "source_column": "source"}
    with pytest.raises(ValueError, match="`validation_guidance_scale` is 2.0"):
        train(**guided)
    train(**guided | {"source_dropout_prob": 0.1})


def test_a_plain_model_is_fine_tuned(short, tmp_path):
    """Its input gets the channels of the source, with weights of 0."""
    base = save_base(tmp_path / "base", random_unet())
    del short["model_config_name_or_path"]
    tuned = short | {"pretrained_model_name_or_path": base, "source_column": "source"}
    train(**tuned | {"max_train_steps": 1, "use_ema": False, "learning_rate": 1e-6})
    before, after = (
        load_file(Path(run, "unet", "diffusion_pytorch_model.safetensors")) for run in (base, short["output_dir"])
    )
    weight = after["conv_in.weight"]
    assert weight.shape[1] == 6
    assert (weight[:, :3] - before["conv_in.weight"]).abs().max() < 2e-6
    assert 0 < weight[:, 3:].abs().max() < 2e-6
    again = {"pretrained_model_name_or_path": short["output_dir"], "output_dir": str(tmp_path / "again")}
    train(**tuned | again)


def test_measures_are_logged(short, tmp_path, caplog):
    """On training images; they are those of the strips."""
    with caplog.at_level(logging.INFO):
        train(**short, source_column="source", validation_steps=1)
    rows = [row for row in read_metrics(short["output_dir"]) if "validation_psnr" in row]
    assert [row["step"] for row in rows] == [1, 2]
    assert "validation_dice" not in rows[0]
    measures = json.loads(Path(short["output_dir"], "image_to_image.json").read_text())
    assert measures["psnr"] == rows[1]["validation_psnr"]
    assert measures["ssim"] == rows[1]["validation_ssim"]
    assert (measures["num_images"], measures["held_out"], measures["step"]) == (2, False, 2)
    assert re.search(r"Validation at step 2 on 2 training images: psnr [\d.]+, ssim ", caplog.text)
    pixels = np.asarray(Image.open(Path(short["output_dir"], "samples-0000002.png"))).astype(float)
    top = pixels.shape[0] - 2 * (64 + 2)
    errors = []
    for row in range(2):
        y = top + row * 66 + 4
        columns = [pixels[y : y + 64 : 8, 2 + column * 66 + 4 : 2 + column * 66 + 64 : 8] for column in range(3)]
        errors.append(((columns[1] - columns[2]) ** 2).mean())
        np.testing.assert_array_equal(columns[0], 255 - columns[2])
    expected = np.mean([10 * np.log10(255**2 / error) for error in errors])
    assert measures["psnr"] == pytest.approx(expected, rel=1e-6)


def test_held_out_pairs(short, tmp_path, caplog):
    order = range(100, 108)
    held_out = write_parquet(tmp_path / "held_out.parquet", order, image=target, key=key, label=label)
    files = {"source_data_files": write_parquet(tmp_path / "sources.parquet", image=source, key=key)}
    files |= {"pair_column": "key", "validation_data_files": held_out}
    others = write_parquet(tmp_path / "others.parquet", order, image=source, key=key)
    with pytest.raises(ValueError, match="`validation_data_files` needs `validation_source_data_files`"):
        train(**short, **files)
    with caplog.at_level(logging.INFO):
        train(**short, **files, validation_source_data_files=others, label_column="label")
    measures = json.loads(Path(short["output_dir"], "image_to_image.json").read_text())
    assert measures["held_out"] is True
    assert "on 2 held-out images" in caplog.text
    with Image.open(Path(short["output_dir"], "samples-0000002.png")) as grid:
        first = np.asarray(grid)[grid.height - 2 * 66 + 4 :: 8, 2 + 2 * 66 + 4 : 2 + 3 * 66 - 2 : 8][:8]
    np.testing.assert_array_equal(first, np.asarray(target(100)))


def test_masks_have_a_dice_coefficient(short, tmp_path):
    def mask(index):
        generator = np.random.default_rng(index)
        return Image.fromarray(255 * generator.integers(0, 2, (8, 8, 1), dtype=np.uint8).repeat(3, axis=2))

    short["data_files"] = write_parquet(tmp_path / "masks.parquet", image=mask, source=source)
    train(**short, source_column="source")
    measures = json.loads(Path(short["output_dir"], "image_to_image.json").read_text())
    assert 0 <= measures["dice"] <= 1


def test_sources_of_zeros_and_ones(short, tmp_path, caplog):
    def mask(index):
        return Image.fromarray(np.asarray(target(index)) // 128)

    short["data_files"] = write_parquet(tmp_path / "masks.parquet", image=target, source=mask)
    train(**short, source_column="source")
    assert "The conditioning images range from 0 to 1 and fill 0.4% of 0 to 255" in caplog.text
    assert "pass `--source_value_range auto` or `--source_value_range 0 1`." in caplog.text


@pytest.mark.slow
def test_launched_in_two_processes(short, tmp_path):
    files = {"source_data_files": write_parquet(tmp_path / "sources.parquet", image=source, key=key)}
    held_out = {
        "validation_data_files": short["data_files"],
        "validation_source_data_files": files["source_data_files"],
    }
    launch("train_image_to_image", short | files | held_out | {"pair_column": "key", "train_batch_size": 4}, tmp_path)
    assert [row["step"] for row in read_metrics(short["output_dir"]) if "validation_psnr" in row] == [2]
    assert (Path(short["output_dir"]) / "loss_curves.png").is_file()
    ADMImageToImagePipeline.from_pretrained(short["output_dir"])


def write_arrays(path, make, order=range(NUMBER)):
    path.mkdir()
    for index in order:
        np.save(path / f"{index:02d}.npy", make(index))
    return str(path)


class TestFormats:
    """Sources and targets of other channels, depths and shapes."""

    def bands(self, index):
        """Four channels of 16 bits, of values from 100 to 4100, 8 x 16."""
        return np.random.default_rng(index).integers(100, 4101, (8, 16, 4)).astype(np.uint16)

    def mask(self, index):
        """Where the second channel is above its middle: 0 and 255."""
        return Image.fromarray((255 * (self.bands(index)[..., 1] > 2100)).astype(np.uint8))

    @pytest.fixture
    def segmentation(self, short, tmp_path):
        del short["data_files"]
        config = {"model_config_name_or_path": write_model_config(tmp_path, in_channels=5, out_channels=2)}
        folders = {"train_data_dir": write_folder(tmp_path / "masks", self.mask)}
        folders["source_data_dir"] = write_arrays(tmp_path / "bands", self.bands)
        return short | config | folders | {"resolution": "8x16", "source_value_range": [100, 4100]}

    def test_masks_of_four_bands(self, segmentation, seen):
        train(**segmentation)
        for images, extra_channels, _ in seen:
            assert images.shape[1:] == (1, 8, 16)
            assert extra_channels.shape[1:] == (4, 8, 16)
            assert torch.equal(images[:, 0] > 0, extra_channels[:, 1] * 2000 + 2100 > 2100.5)
        pipe = ADMImageToImagePipeline.from_pretrained(segmentation["output_dir"])
        kind = pipe.source_format
        assert (kind.mode, kind.channels, kind.value_range, kind.num_levels) == ("array", 4, (100, 4100), 4001)
        assert (pipe.image_format.mode, pipe.sample_channels) == ("L", 1)
        (image,) = pipe(self.bands(3), num_inference_steps=1).images
        assert (image.mode, image.size) == ("L", (16, 8))
        assert "dice" in json.loads(Path(segmentation["output_dir"], "image_to_image.json").read_text())

    def test_the_channels_may_come_from_the_data(self, segmentation, tmp_path):
        config = {name: value for name, value in TOY_CONFIG.items() if name not in ("in_channels", "out_channels")}
        (tmp_path / "open.json").write_text(json.dumps(config))
        train(**segmentation | {"model_config_name_or_path": str(tmp_path / "open.json")})
        unet = ADMImageToImagePipeline.from_pretrained(segmentation["output_dir"]).unet
        assert (unet.config.in_channels, unet.config.out_channels) == (5, 2)

    def test_the_range_is_that_of_the_pretrained_model(self, segmentation, tmp_path):
        train(**segmentation)
        for name in ("model_config_name_or_path", "source_value_range"):
            del segmentation[name]
        tuned = {"pretrained_model_name_or_path": segmentation["output_dir"], "output_dir": str(tmp_path / "tuned")}
        train(**segmentation | tuned)
        first, second = (
            ADMImageToImagePipeline.from_pretrained(run).source_format
            for run in (segmentation["output_dir"], tmp_path / "tuned")
        )
        assert first == second

    def test_the_other_way_round(self, segmentation, tmp_path):
        """Four channels, of which three are shown, from a mask."""
        changes = {"train_data_dir": segmentation["source_data_dir"], "source_data_dir": segmentation["train_data_dir"]}
        changes |= {"model_config_name_or_path": write_model_config(tmp_path, in_channels=5, out_channels=8)}
        changes |= {"value_range": segmentation.pop("source_value_range"), "preview_channels": [3, 2, 1]}
        train(**segmentation | changes)
        pipe = ADMImageToImagePipeline.from_pretrained(segmentation["output_dir"])
        values = pipe(self.mask(0), num_inference_steps=1, output_type="np").images
        assert values.shape == (1, 8, 16, 4)
        assert 100 <= values.min() <= values.max() <= 4100
        measures = json.loads(Path(segmentation["output_dir"], "image_to_image.json").read_text())
        assert 0 < measures["psnr"] < 30

    def test_noise_of_any_data(self, segmentation, seen, tmp_path):
        del segmentation["source_value_range"]
        folder = {"train_data_dir": segmentation.pop("source_data_dir"), "source": "noise"}
        folder |= {"model_config_name_or_path": write_model_config(tmp_path, in_channels=8, out_channels=8)}
        train(**segmentation | folder | {"value_range": ["auto"]})
        assert all(extra_channels.shape == images.shape for images, extra_channels, _ in seen)
        pipe = ADMImageToImagePipeline.from_pretrained(segmentation["output_dir"])
        assert pipe.source_format == pipe.image_format

    def test_grey_sources_of_colour_files(self, short, seen, tmp_path):
        config = {"model_config_name_or_path": write_model_config(tmp_path, in_channels=4)}
        train(**short | config, source_column="source", source_mode="L")
        for images, extra_channels, _ in seen:
            expected = torch.stack([grayscale(0.5 - image / 2) for image in images])
            torch.testing.assert_close(extra_channels, 2 * expected - 1, rtol=0, atol=1e-6)


# 3. Recipes


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_each_recipe_parses(recipe, monkeypatch):
    monkeypatch.chdir(REPOSITORY)  # their paths are relative to it
    model, *_, text, pairs = parse_args(train_image_to_image.ARGUMENT_TYPES, ["--config", str(recipe)])
    unet = json.loads(Path(model.pretrained_model_name_or_path, "unet", "config.json").read_text())
    assert unet["in_channels"] == 3  # it is widened
    assert text.caption_column == "text"
    assert (pairs.source == "grayscale") == (pairs.source_data_files is None)


# 4. Bad input


class TestBadInput:
    @pytest.fixture(autouse=True)
    def no_training(self, monkeypatch):
        def fail(*args, **kwargs):
            raise AssertionError("training began")

        monkeypatch.setattr(train_image_to_image, "training_losses", fail)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({}, "Got no source images. Pass exactly one of `source`"),
            ({"source": "noise", "source_column": "source"}, "Got `source` and `source_column`"),
            ({"source_data_dir": "a", "source_data_files": "b"}, "Got `source_data_dir` and `source_data_files`"),
            ({"source_data_dir": "a", "source_column": "b"}, "Got `source_data_dir` and `source_column`"),
            ({"source_column": "source", "pair_column": "key"}, "`pair_column` needs `source_data_files`"),
            ({"source_column": "source", "source_dropout_prob": 1.5}, "`source_dropout_prob` is 1.5"),
            (
                {"source_column": "sauce"},
                "`source_column` is 'sauce', but .* has the columns image, source, key, label",
            ),
            ({"source_column": "key"}, "`source_column` 'key' of .* text that is no path of a file, such as 'key 0'"),
            ({"source_column": "image"}, "`image_column` and `source_column` are both 'image'. Name two columns"),
            ({"source": "noise", "validation_source_data_files": "a"}, "without `source_data_files`"),
            ({"source_data_dir": "nowhere"}, "'nowhere', which is not a folder"),
        ],
    )
    def test_arguments(self, short, changes, message):
        with pytest.raises(ValueError, match=message):
            train(**short | changes)

    def test_repeated_and_missing_pairs(self, short, tmp_path):
        files = write_parquet(tmp_path / "others.parquet", [0, 1, 1], image=source, key=key)
        with pytest.raises(ValueError, match="not unique: several source images have 'key 1'"):
            train(**short, source_data_files=files, pair_column="key")
        files = write_parquet(tmp_path / "none.parquet", [50, 51], image=source, key=key)
        with pytest.raises(ValueError, match="None of the 24 target images has a source image"):
            train(**short, source_data_files=files, pair_column="key")

    @pytest.mark.parametrize(
        ("channels", "arguments", "message"),
        [
            (6, {"source": "grayscale"}, "takes 3 channels in addition .* source images .grayscale. have 1"),
            (4, {"source": "noise"}, "takes 1 channels in addition .* source images .noise. have 3"),
            (4, {"source_column": "source"}, "Source images: .*--source_mode L"),
            (3, {"source_column": "source"}, "takes 3 channels and predicts images of 3, so that none are left"),
            (6, {"source_column": "source", "source_mode": "L"}, "Source images: `--source_mode` L has 1 channel"),
            (6, {"source": "noise", "source_mode": "RGB"}, "are for pairs of images, but `source` is noise"),
            (6, {"source_column": "source", "source_value_range": [5, 1]}, "`source_value_range` is '5.0 1.0'"),
        ],
    )
    def test_networks_of_other_channels(self, short, channels, arguments, message, tmp_path):
        short["model_config_name_or_path"] = write_model_config(tmp_path, in_channels=channels)
        with pytest.raises(ValueError, match=message):
            train(**short, **arguments)

    def test_colours_that_other_data_do_not_have(self, short, tmp_path):
        short["model_config_name_or_path"] = write_model_config(tmp_path, in_channels=5, out_channels=8)
        folder = write_arrays(tmp_path / "bands", lambda index: np.zeros((8, 8, 4), np.uint8) + index)
        short |= {"data_files": None, "train_data_dir": folder}
        short = {name: value for name, value in short.items() if value is not None}
        with pytest.raises(ValueError, match="`source` grayscale is made from RGB images, but these are 4-channel"):
            train(**short, source="grayscale")
