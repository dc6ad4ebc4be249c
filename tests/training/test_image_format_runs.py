"""Every training script on images that are not 8-bit RGB squares: runs, resumed ones, and what is refused."""

import json
import logging
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from runs import SHORT_RUN, flags, own_process_state, read_metrics, reset_accelerate
from scripts import load_script
from toy_models import CONDITIONAL, TOY_CLASSIFIER_CONFIG, TOY_CONFIG, random_unet

from diffusers_adm import (
    AdaGNClassifierModel,
    AdaGNControlNetModel,
    ADMControlNetPipeline,
    ADMInpaintPipeline,
    ADMPipeline,
    ADMSuperResolutionPipeline,
    LearnedVarianceDDPMScheduler,
)
from diffusers_adm.conditioning.image_format import ImageFormat
from diffusers_adm.training import run as training_run
from diffusers_adm.training.manifest import write_manifest


SCRIPTS = {
    name: load_script(name) for name in ("train_adm", "train_classifier", "train_controlnet", "train_super_resolution")
}
NONE = dict.fromkeys(("vae", "text_encoder", "tokenizer", "classifier"))
FORMATS = {
    "grey": ImageFormat("L", 1, (100, 4000), 3901),  # 12 bits in a file of 16, measured
    "bands": ImageFormat("array", 5, (-1.5, 2.5), None),
    "rgba": ImageFormat("RGBA", 4, (0, 255), 256),
}
SIZES = {"grey": (8, 8), "bands": (8, 16), "rgba": (8, 8)}
# The arguments of each kind of data, apart from its folder.
ARGUMENTS = {
    "grey": {"value_range": "auto"},
    "bands": {"value_range": [-1.5, 2.5], "resolution": "8x16", "preview_channels": [5, 4, 2]},
    "rgba": {"image_mode": "RGBA"},
}
CONDITIONS = {"grey": "edges", "bands": "low_resolution", "rgba": "color_blocks"}


@pytest.fixture(autouse=True)
def own_state(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(training_run, "plot_loss_curves", lambda *args: None)  # slow, and tested elsewhere
    monkeypatch.setattr(SCRIPTS["train_classifier"], "plot_classifier_curves", lambda *args: None)
    monkeypatch.setattr(SCRIPTS["train_classifier"], "plot_accuracy_by_timestep", lambda *args: None)
    with own_process_state("train_adm"):
        yield
    for name in SCRIPTS:
        logging.getLogger(name).setLevel(logging.NOTSET)


def train(script, **arguments):
    reset_accelerate()
    SCRIPTS[script].main(flags(**arguments))


def write_images(folder, kind, number=12):
    """Images of two classes, as files in two folders."""
    generator = np.random.default_rng(0)
    for index in range(number):
        place = folder / ("even", "odd")[index % 2]
        place.mkdir(parents=True, exist_ok=True)
        if kind == "grey":
            values = generator.integers(100, 4001, (8, 8), dtype=np.uint16)
            values[0, :2] = 100, 4000
            Image.fromarray(values).save(place / f"{index}.{('png', 'tif')[index % 2]}")
        elif kind == "bands":
            np.save(place / f"{index}.npy", generator.uniform(-1.5, 2.5, (8, 16, 5)).astype(np.float32))
        else:
            Image.fromarray(generator.integers(0, 256, (8, 8, 4), dtype=np.uint8)).save(place / f"{index}.png")
    return str(folder)


def write_config(folder, name="model", base=TOY_CONFIG, **changes):
    """A config of a toy network without channels, unless `changes` has them."""
    config = {key: value for key, value in base.items() if key not in ("in_channels", "out_channels", "num_classes")}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(config | changes))
    return str(path)


def make_base(folder, image_format, **config):
    channels = image_format.channels
    unet = random_unet(in_channels=channels, out_channels=2 * channels, **config)
    ADMPipeline(
        unet=unet, scheduler=LearnedVarianceDDPMScheduler(), **NONE, image_format=image_format.to_config()
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=FORMATS)
def kind(request):
    return request.param


@pytest.fixture
def short(tmp_path, kind):
    return SHORT_RUN | {
        "model_config_name_or_path": write_config(tmp_path),
        "train_data_dir": write_images(tmp_path / "data", kind),
        "train_batch_size": 4,
        "output_dir": str(tmp_path / "run"),
        **ARGUMENTS[kind],
    }


def grid_of(folder):
    (path,) = Path(folder).glob("samples-*.png")
    return Image.open(path)


def values_of(images, image_format):
    """Checks that images of the output "np" have the shape and the values of the format; pictures are in [0, 1]."""
    low, high = (0, 1) if image_format.is_viewable else image_format.value_range
    assert images.shape[-1] == image_format.channels
    assert low <= images.min() < images.max() <= high


# 1. Each script


@pytest.mark.parametrize("task", ["generate", "inpaint"])
def test_generation_and_inpainting(short, kind, task, caplog):
    image_format, (height, width) = FORMATS[kind], SIZES[kind]
    train("train_adm", **short, task=task)
    assert np.isfinite([row["loss"] for row in read_metrics(short["output_dir"])]).all()
    pipeline = (ADMInpaintPipeline if task == "inpaint" else ADMPipeline).from_pretrained(short["output_dir"])
    c = image_format.channels
    assert (pipeline.unet.config.in_channels, pipeline.unet.config.out_channels) == (
        2 * c + 1 if task == "inpaint" else c,
        2 * c,
    )
    assert pipeline.image_format == image_format
    assert pipeline.unet.config.sample_size == (height if height == width else [height, width])
    arguments = {}
    if task == "inpaint":
        blank = torch.full((c, height, width), 0.5)  # within all ranges
        arguments = {"image": blank, "mask_image": torch.ones(1, height, width)}
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(num_inference_steps=2, output_type="np", **arguments).images
    assert images.shape == (1, height, width, c)
    values_of(images, image_format)
    assert f"The training data are {image_format}" in caplog.text
    assert ("levels), measured" in caplog.text) == (kind == "grey")
    assert ("bound in the loss (`objective` hybrid) is that of their density" in caplog.text) == (kind == "bands")
    assert f"at {height} x {width}, {image_format}" in caplog.text
    assert grid_of(short["output_dir"]).mode == "RGB"


def test_super_resolution(short, kind):
    (height, width), image_format = SIZES[kind], FORMATS[kind]
    low_res_size = 4 if height == width else "4x8"
    train("train_super_resolution", **short, low_res_size=low_res_size)
    pipeline = ADMSuperResolutionPipeline.from_pretrained(short["output_dir"])
    c = image_format.channels
    assert (pipeline.unet.config.in_channels, pipeline.unet.config.out_channels) == (2 * c, 2 * c)
    assert (pipeline.image_format, pipeline.config.low_res_size) == (
        image_format,
        4 if height == width else [4, 8],
    )
    small = torch.full((c, height // 2, width // 2), 0.5)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(image=small, num_inference_steps=2, output_type="np").images
    assert images.shape == (1, height, width, c)
    assert grid_of(short["output_dir"]).width >= 3 * width


def test_controlnet_of_a_base(short, kind, tmp_path):
    image_format, (height, width) = FORMATS[kind], SIZES[kind]
    base = make_base(tmp_path / "base", image_format, sample_size=(height, width), **CONDITIONAL)
    short = {name: value for name, value in short.items() if name in (*SHORT_RUN, "train_data_dir", "output_dir")}
    train("train_controlnet", **short, pretrained_model_name_or_path=base, condition=CONDITIONS[kind])
    controlnet = AdaGNControlNetModel.from_pretrained(short["output_dir"])
    expected = {"grey": ImageFormat("L", 1), "rgba": ImageFormat(), "bands": image_format}[kind]
    assert controlnet.config.conditioning_channels == expected.channels
    assert ImageFormat.from_config(controlnet.config.condition_format, expected.channels) == expected
    assert ImageFormat.from_config(controlnet.config.image_format, image_format.channels) == image_format
    pipeline = ADMControlNetPipeline.from_pretrained(base, controlnet=controlnet)
    pipeline.set_progress_bar_config(disable=True)
    condition = torch.full((expected.channels, height, width), 0.5)
    images = pipeline(image=condition, num_inference_steps=2, output_type="np").images
    assert images.shape == (1, height, width, image_format.channels)
    grid_of(short["output_dir"])


def test_classifier(short, kind, tmp_path):
    image_format, (height, width) = FORMATS[kind], SIZES[kind]
    del short["num_validation_images"], short["validation_num_inference_steps"]
    short.pop("preview_channels", None)
    short["model_config_name_or_path"] = write_config(tmp_path, "classifier", TOY_CLASSIFIER_CONFIG)
    short["label_column"] = "label"
    train("train_classifier", **short, validation_split="train", validation_steps=1)
    classifier = AdaGNClassifierModel.from_pretrained(short["output_dir"], subfolder="classifier")
    assert (classifier.config.in_channels, classifier.config.num_classes) == (image_format.channels, 2)
    assert ImageFormat.from_config(classifier.config.image_format, image_format.channels) == image_format
    size = height if height == width else [height, width]
    assert classifier.config.sample_size == size
    # It guides a pipeline of the same images, and is fine-tuned on them without naming their range again.
    base = ADMPipeline.from_pretrained(make_base(tmp_path / "base", image_format, sample_size=size))
    ADMPipeline(**base.components | {"classifier": classifier}, image_format=image_format.to_config())
    short |= {"pretrained_model_name_or_path": short.pop("output_dir"), "output_dir": str(tmp_path / "tuned")}
    del short["model_config_name_or_path"]
    for name in ("value_range", "image_mode", "resolution"):
        short.pop(name, None)
    train("train_classifier", **short)
    tuned = AdaGNClassifierModel.from_pretrained(tmp_path / "tuned", subfolder="classifier")
    assert tuned.config.image_format == classifier.config.image_format


@pytest.fixture
def validated(monkeypatch):
    """The conditions of the examples that validation shows, and those that the ControlNet gets for them."""
    shown, given = [], []
    control_grid, embed_condition = SCRIPTS["train_controlnet"].control_grid, AdaGNControlNetModel.embed_condition

    def record_examples(pipeline, examples, *args):
        shown.extend(tensors["conditions"] for tensors, _ in examples)

        def record_inputs(self, images):
            given.append(images)
            return embed_condition(self, images)

        with monkeypatch.context() as patch:
            patch.setattr(AdaGNControlNetModel, "embed_condition", record_inputs)
            return control_grid(pipeline, examples, *args)

    monkeypatch.setattr(SCRIPTS["train_controlnet"], "control_grid", record_examples)
    return lambda: (torch.stack(shown), torch.cat(given))


@pytest.mark.parametrize("kind", ["bands"], indirect=True)
def test_validation_with_conditions_of_bands(short, tmp_path, validated):
    short |= {"pretrained_model_name_or_path": make_base(tmp_path / "base", FORMATS["bands"], sample_size=[8, 16])}
    del short["model_config_name_or_path"], short["value_range"]
    train("train_controlnet", **short, condition="low_resolution")
    shown, given = validated()
    assert shown.shape[1] == 5
    assert shown.std() > 0.01
    torch.testing.assert_close(given, shown, rtol=0, atol=1e-6)


class TestConditionsOfAColumn:
    def test_validation_with_floats(self, short, validated):
        train("train_controlnet", **short, conditioning_image_column="flow", condition_value_range=[-3, 3])
        shown, given = validated()
        assert shown.shape[1] == 2
        torch.testing.assert_close(given, shown, rtol=0, atol=1e-6)

    @pytest.fixture
    def short(self, tmp_path):
        generator = np.random.default_rng(0)
        columns = {
            "image": [Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8)) for _ in range(8)],
            "flow": generator.uniform(-3, 3, (8, 8, 8, 2)).astype(np.float32).tolist(),
            "sketch": [Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8)) for _ in range(8)],
        }
        features = {"image": datasets.Image(), "flow": datasets.Array3D((8, 8, 2), "float32")}
        features["sketch"] = datasets.Image()
        path = str(tmp_path / "pairs.parquet")
        datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(path)
        return SHORT_RUN | {
            "pretrained_model_name_or_path": make_base(tmp_path / "base", ImageFormat("L", 1)),
            "data_files": path,
            "output_dir": str(tmp_path / "run"),
        }

    def test_of_two_channels(self, short, tmp_path):
        short |= {"conditioning_image_column": "flow", "condition_value_range": [-3, 3]}
        train("train_controlnet", **short)
        controlnet = AdaGNControlNetModel.from_pretrained(short["output_dir"])
        expected = ImageFormat("array", 2, (-3, 3), None)
        assert ImageFormat.from_config(controlnet.config.condition_format, 2) == expected
        # Fine-tuning takes the range from the ControlNet.
        del short["condition_value_range"]
        short |= {"controlnet_model_name_or_path": short["output_dir"], "output_dir": str(tmp_path / "tuned")}
        train("train_controlnet", **short)
        tuned = AdaGNControlNetModel.from_pretrained(tmp_path / "tuned")
        assert tuned.config.condition_format == controlnet.config.condition_format

    def test_grey_ones_become_rgb(self, short):
        train("train_controlnet", **short, conditioning_image_column="sketch")
        controlnet = AdaGNControlNetModel.from_pretrained(short["output_dir"])
        assert controlnet.config.conditioning_channels == 3

    def test_mistakes(self, short, tmp_path):
        with pytest.raises(ValueError, match="Conditioning images: .*Pass `--condition_value_range LOW HIGH`"):
            train("train_controlnet", **short, conditioning_image_column="flow")
        with pytest.raises(ValueError, match="`condition_value_range` was given without `conditioning_image_column`"):
            train("train_controlnet", **short, condition="edges", condition_value_range="auto")
        other = AdaGNControlNetModel.from_unet(random_unet(in_channels=1, out_channels=2), conditioning_channels=1)
        other.register_to_config(image_format=ImageFormat("L", 1, (0, 4095), 4096).to_config())
        other.save_pretrained(tmp_path / "other")
        short |= {"condition": "edges", "controlnet_model_name_or_path": str(tmp_path / "other")}
        with pytest.raises(
            ValueError, match="trained for a base model of grey images from 0 to 4095 .* Train a new one"
        ):
            train("train_controlnet", **short)


# 2. Resuming and fine-tuning


@pytest.mark.parametrize("kind", ["grey"], indirect=True)
class TestGoingOn:
    def test_a_resumed_run(self, short, tmp_path):
        train("train_adm", **short | {"checkpointing_steps": 1})
        whole = read_metrics(short["output_dir"])[-1]
        record = json.loads((tmp_path / "run" / "checkpoint-1" / "run_record.json").read_text())
        assert record["facts"]["image_format"] == FORMATS["grey"].to_config()
        resume = {"resume_from_checkpoint": str(tmp_path / "run" / "checkpoint-1")}
        train("train_adm", **resume, value_range=[100, 4000])  # which is what was measured
        assert read_metrics(short["output_dir"])[-1] == {key: pytest.approx(value) for key, value in whole.items()}
        for changes, message in (
            (
                {"value_range": [0, 4095]},
                r"`value_range` is \[0.0, 4095.0\], and was \['auto'\].*pass `--value_range a",
            ),
            ({"image_mode": "array"}, "`image_mode` is 'array', and was None"),
            ({"resolution": "8x4"}, "`resolution` is '8x4', and was None"),
        ):
            with pytest.raises(ValueError, match=message):
                train("train_adm", **resume, **changes)
        train("train_adm", **resume, value_range=[0, 4095], force_resume=True, preview_channels=1)
        pipeline = ADMPipeline.from_pretrained(short["output_dir"])
        assert pipeline.image_format == ImageFormat("L", 1, (0, 4095), 4096)

    def test_data_of_another_range(self, short, tmp_path):
        train("train_adm", **short)
        values = np.full((8, 8), 100, dtype=np.uint16)
        values[0, 0] = 4050
        Image.fromarray(values).save(next((tmp_path / "data").rglob("*.png")))
        resume = {"resume_from_checkpoint": str(tmp_path / "run" / "checkpoint-2"), "max_train_steps": 3}
        message = r"`value_range` of the images is \[100, 4050\], and was \[100, 4000\].*former images, or pass "
        with pytest.raises(ValueError, match=message + "`--image_mode L --value_range 100 4000`"):
            train("train_adm", **resume)

    def test_a_checkpoint_without_a_format_is_of_8_bit_rgb(self, short, tmp_path):
        train("train_adm", **short)
        path = tmp_path / "run" / "checkpoint-2" / "run_record.json"
        record = json.loads(path.read_text())
        del record["facts"]["image_format"]
        path.write_text(json.dumps(record))
        write_manifest(path.parent)
        with pytest.raises(ValueError, match="`image_mode` of the images is 'L', and was 'RGB'"):
            train("train_adm", resume_from_checkpoint=str(path.parent), max_train_steps=3)

    def test_the_pretrained_format_is_kept(self, short, tmp_path):
        wide = ImageFormat("L", 1, (0, 4095), 4096)
        del short["model_config_name_or_path"], short["value_range"]
        short["pretrained_model_name_or_path"] = make_base(tmp_path / "base", wide)
        train("train_adm", **short)
        assert ADMPipeline.from_pretrained(short["output_dir"]).image_format == wide
        with pytest.raises(ValueError, match="trained on grey images from 0 to 4095 .*, and `lora_rank` leaves"):
            train("train_adm", **short | {"output_dir": str(tmp_path / "lora")}, value_range="auto", lora_rank=2)
        with pytest.raises(ValueError, match="image_mode` is array, but the model was trained on grey images"):
            train("train_adm", **short | {"output_dir": str(tmp_path / "x")}, image_mode="array")

    def test_a_pretrained_model_is_widened_by_its_own_channels(self, short, tmp_path):
        del short["model_config_name_or_path"]
        short["pretrained_model_name_or_path"] = make_base(tmp_path / "base", FORMATS["grey"])
        train("train_adm", **short, task="inpaint")
        assert ADMInpaintPipeline.from_pretrained(short["output_dir"]).unet.config.in_channels == 3


# 3. Mistakes


@pytest.mark.parametrize(
    ("kind", "config", "changes", "message"),
    [
        ("grey", {}, {"value_range": [4095, 0]}, "`value_range` is '4095.0 0.0'; .*the lower one first"),
        ("grey", {}, {"value_range": "all"}, "`value_range` is 'all'; pass two numbers"),
        ("grey", {}, {"value_range": [0, 1000]}, "12 images have values outside"),
        ("grey", {"in_channels": 3, "out_channels": 6}, {"image_mode": "L"}, "`--image_mode` L has 1 .*network has 3"),
        ("grey", {}, {"preview_channels": 2}, "`preview_channels` is 2, but the images have 1 channel. Pass 1"),
        ("bands", {}, {"preview_channels": [0, 1, 2]}, "`preview_channels` is 0 1 2. Count from 1"),
        ("bands", {}, {"preview_channels": [4, 6]}, "Count from 1 to 5"),
        ("bands", {}, {"preview_channels": [1, 1], "train_data_dir": "nowhere"}, "is 1 1, which names a channel twice"),
        ("bands", {}, {"value_range": "none"}, "floating point numbers .* `--value_range auto`"),
        ("bands", {}, {"resolution": "9x16"}, r"The resolution is 9 x 16; .*--resolution 10x16`"),
        ("bands", {}, {"resolution": "8x"}, "`resolution` is '8x'; pass the side of a square .*HEIGHTxWIDTH"),
        ("bands", {"in_channels": 4, "out_channels": 8}, {}, "The network has 4 channel.*arrays of 5 channels"),
        ("bands", {"out_channels": 5}, {}, "has 5 output channels.* need 4 output"),
        ("rgba", {}, {"image_mode": "array"}, None),
    ],
)
def test_mistakes(kind, config, changes, message, tmp_path, monkeypatch):
    def begin(*args, **kwargs):
        raise RuntimeError("training began")

    monkeypatch.setattr(SCRIPTS["train_adm"], "training_losses", begin)
    arguments = SHORT_RUN | {
        "model_config_name_or_path": write_config(tmp_path, **config),
        "train_data_dir": write_images(tmp_path / "data", kind),
        "output_dir": str(tmp_path / "run"),
        **ARGUMENTS[kind],
        **changes,
    }
    with pytest.raises(ValueError if message else RuntimeError, match=message or "training began"):
        train("train_adm", **arguments)


@pytest.mark.parametrize(
    ("low_res_size", "message"),
    [("4x4", "low_res_size` is 4 and the resolution 8 x 16: .*Pass both as HEIGHTxWIDTH"), ("3x6", "a multiple")],
)
def test_a_low_resolution_of_another_shape(low_res_size, message, tmp_path):
    arguments = SHORT_RUN | {
        "model_config_name_or_path": write_config(tmp_path),
        "train_data_dir": write_images(tmp_path / "data", "bands"),
        "output_dir": str(tmp_path / "run"),
        **ARGUMENTS["bands"],
        "low_res_size": low_res_size,
    }
    with pytest.raises(ValueError, match=message):
        train("train_super_resolution", **arguments)


def test_pretrained_formats_are_compared_with_the_network(tmp_path):
    folder = Path(make_base(tmp_path / "base", ImageFormat("L", 1)))
    index = json.loads((folder / "model_index.json").read_text())
    index["image_format"]["channels"], index["image_format"]["mode"] = 3, "RGB"
    (folder / "model_index.json").write_text(json.dumps(index))
    arguments = {"train_data_dir": write_images(tmp_path / "data", "grey"), "output_dir": str(tmp_path / "run")}
    with pytest.raises(ValueError, match="`image_format` has 3 channels, but the images of this model have 1"):
        train("train_adm", **SHORT_RUN | arguments, pretrained_model_name_or_path=str(folder))
