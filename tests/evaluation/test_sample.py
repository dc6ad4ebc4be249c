"""Many images: the same whatever they are drawn together with, also after a `kill -9`; the files; the command."""

import importlib.util
import json
import os
import signal

import datasets
import numpy as np
import pytest
import tifffile
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import AutoencoderKL, DDIMScheduler, ImagePipelineOutput
from PIL import Image
from processes import run_distributed, start
from tolerances import levels_apart
from toy_models import (
    CONDITIONAL,
    random_classifier,
    random_text_encoder,
    random_text_unet,
    random_unet,
    toy_tokenizer,
)

from diffusers_adm import ADMPipeline, LearnedVarianceDDPMScheduler
from diffusers_adm.conditioning.image_format import ImageFormat
from diffusers_adm.data.decoding import decode_image
from diffusers_adm.data.pixels import open_image
from diffusers_adm.evaluation import sample_images
from diffusers_adm.evaluation.sample.__main__ import main
from diffusers_adm.training import derive_seed, save_id2label


NAMES = {0: "birds", 1: "cats", 2: "dogs", 3: "fish"}


@pytest.fixture(autouse=True)
def own_process_state(monkeypatch):
    """Accelerate's singletons are put back."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def toy_pipeline(unet=None, id2label=None, image_format=None, **components):
    scheduler = LearnedVarianceDDPMScheduler(num_train_timesteps=20, beta_end=0.2)
    components = {"vae": None, "text_encoder": None, "tokenizer": None, "classifier": None, **components}
    config = {"id2label": id2label, "image_format": image_format}
    return ADMPipeline(unet or random_unet(), scheduler, **components, **config)


def class_pipeline():
    return toy_pipeline(random_unet(**CONDITIONAL), NAMES, classifier=random_classifier(num_classes=4))


def text_pipeline():
    return toy_pipeline(
        random_text_unet(num_class_embeds=5, null_class_id=4),
        NAMES,
        text_encoder=random_text_encoder("bert"),
        tokenizer=toy_tokenizer("bert"),
    )


FEW_STEPS = {"num_inference_steps": 3}


def draw(pipe, num_images, output_dir, **arguments):
    arguments = {"pipeline_options": FEW_STEPS, "progress_bar": False, **arguments}
    return sample_images(pipe, num_images, output_dir, **arguments)


def read(folder):
    """`{name: pixels}` of a folder."""
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))}


def assert_same(actual, expected):
    """
    Sums in another order, as batches of another size may have them, move a value that lies halfway between two levels
    to the other one: of a real network 3 of 27648 did. Another seed, or class, changes most of them by many levels.
    """
    assert list(actual) == list(expected)
    differences = [np.abs(actual[name].astype(int) - pixels) for name, pixels in expected.items()]
    assert np.max(differences) <= 1
    assert np.mean(differences) <= 1e-3


def flags(**arguments):
    words = []
    for name, value in arguments.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def run(**arguments):
    """The command, in this process."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    main(flags(**arguments))


def saved(pipe, path):
    pipe.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """Saved models: one with classes and a classifier, one that reads text as well, one with neither."""
    path = tmp_path_factory.mktemp("stock")
    saved(class_pipeline(), path / "classes")
    saved(text_pipeline(), path / "text")
    saved(toy_pipeline(), path / "plain")
    classifier = random_classifier(seed=7, num_classes=4)
    for name in ("classifier", "named", "turned"):
        classifier.save_pretrained(path / name)
    save_id2label(path / "named", NAMES)
    save_id2label(path / "turned", dict(enumerate(reversed(NAMES.values()))))
    return path


# 1. What an image depends on


def test_each_image_is_the_one_its_generator_gives(tmp_path):
    """As drawn by hand, one at a time."""
    pipe = class_pipeline()
    options = {"num_inference_steps": 3, "guidance_scale": 2.0}
    draw(pipe, 5, tmp_path, class_labels=[2, 0, 1], batch_size=2, seed=9, pipeline_options=options)
    for i, pixels in enumerate(read(tmp_path).values()):
        generator = torch.Generator().manual_seed(derive_seed(9, "sample", i))
        expected = pipe(class_labels=[2, 0, 1][i % 3], generator=generator, **options).images[0]
        assert levels_apart(pixels, np.asarray(expected)) <= 1


COMMANDS = {
    "classes": {"model": "classes", "class_labels": "uniform", "guidance_scale": 2, "classifier_guidance_scale": 1},
    "prompts": {
        "model": "text",
        "class_labels": "dogs",
        "prompt": ["a red cat", "the dog on the green mat with a hat", "a"],
        "guidance_scale": 3,
        "eta": 0,
    },
}


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
def test_batches_and_processes_change_nothing(arguments, stock, tmp_path):
    arguments = {
        **arguments,
        "model": stock / arguments["model"],
        "num_images": 11,
        "num_inference_steps": 4,
        "seed": 3,
    }
    run(**arguments, output_dir=tmp_path / "alone", batch_size=5)
    run_distributed(main, flags(**arguments, output_dir=tmp_path / "two", batch_size=3))
    alone = read(tmp_path / "alone")
    assert len(alone) == 11
    assert len({pixels.tobytes() for pixels in alone.values()}) == 11
    assert_same(read(tmp_path / "two"), alone)
    for name in ("metadata.jsonl", "sampling.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    run(**{**arguments, "seed": 4}, output_dir=tmp_path / "seed", batch_size=5)
    assert all(not np.array_equal(other, alone[name]) for name, other in read(tmp_path / "seed").items())


def test_more_images_leave_the_first_as_they_are(tmp_path):
    draw(toy_pipeline(), 3, tmp_path / "grown")
    stamps = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "grown").glob("*.png")}
    draw(toy_pipeline(), 7, tmp_path / "grown")
    draw(toy_pipeline(), 7, tmp_path / "whole")
    assert_same(read(tmp_path / "grown"), read(tmp_path / "whole"))
    assert {name: (tmp_path / "grown" / name).stat().st_mtime_ns for name in stamps} == stamps


# 2. Interruption


def draw_and_die(output_dir):
    """Of 16 batches of 2 images, the fourth is half done."""
    torch.set_num_threads(1)
    pipe = class_pipeline()
    forwards = []

    def count(module, args):
        forwards.append(args)
        if len(forwards) == 3 * 20 + 10:
            os.kill(os.getpid(), signal.SIGKILL)

    pipe.unet.register_forward_pre_hook(count)
    draw(pipe, 32, output_dir, class_labels=range(4), batch_size=2, pipeline_options={"num_inference_steps": 20})


def test_killed_and_gone_on_with(tmp_path):
    process = start(draw_and_die, tmp_path / "killed")
    process.join(timeout=120)
    assert process.exitcode == -signal.SIGKILL
    survivors = sorted((tmp_path / "killed").glob("*.png"))
    assert [path.name for path in survivors] == [f"{index:06d}.png" for index in range(6)]
    assert not (tmp_path / "killed" / "metadata.jsonl").exists()
    stamps = [path.stat().st_mtime_ns for path in survivors]
    (tmp_path / "killed" / ".writing-000031.png").write_bytes(b"half of a")
    survivors[2].unlink()  # a gap, as two processes leave it

    arguments = {"class_labels": range(4), "batch_size": 32, "pipeline_options": {"num_inference_steps": 20}}
    draw(class_pipeline(), 32, tmp_path / "whole", **arguments)
    drawn = []
    pipe = class_pipeline()
    pipe.unet.register_forward_pre_hook(lambda module, args: drawn.append(len(args[0])))
    draw(pipe, 32, tmp_path / "killed", **arguments)
    assert_same(read(tmp_path / "killed"), read(tmp_path / "whole"))
    assert drawn == [32 - 6 + 1] * 20
    del stamps[2], survivors[2]
    assert [path.stat().st_mtime_ns for path in survivors] == stamps
    assert not list((tmp_path / "killed").glob(".writing-*"))
    for name in ("metadata.jsonl", "sampling.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def trained_on(pipe):
    pipe.unet.conv_out.bias.data[0] += 0.001
    return pipe


@pytest.mark.parametrize(
    "change,message",
    [
        ({"seed": 1}, "`seed` was 0 and is now 1"),
        ({"class_labels": [3]}, r"`class_labels` was \[0, 1\] and is now \[3\]"),
        ({"class_labels": None}, r"`class_labels` was \[0, 1\] and is now None"),
        ({"output_format": "npz"}, "`output_format` was 'png' and is now 'npz'"),
        (
            {"pipeline_options": {**FEW_STEPS, "guidance_scale": 4.0, "eta": 0.0}},
            "`guidance_scale` was 1.0 and is now 4.0; `eta` was None and is now 0.0",
        ),
        ({"pipe": trained_on(class_pipeline())}, "`weights` was '[0-9a-f]{32}' and is now '[0-9a-f]{32}'"),
        ({"pipe": class_pipeline().to(torch.bfloat16)}, "`dtype` was 'float32' and is now 'bfloat16'"),
    ],
)
def test_other_settings_are_refused_and_named(change, message, tmp_path):
    arguments = {"pipe": class_pipeline(), "num_images": 2, "output_dir": tmp_path, "class_labels": [0, 1]}
    draw(**arguments)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=rf"other settings: (.*; )?{message}(;|\. Repeat)"):
        draw(**{**arguments, "num_images": 4, **change})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    # What an option is by default may be said or left out.
    draw(**arguments, pipeline_options={**FEW_STEPS, "guidance_scale": 1.0})


def test_another_scheduler_is_refused_and_named(tmp_path):
    pipe = toy_pipeline()
    draw(pipe, 1, tmp_path)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="`scheduler` had _class_name='LearnedVarianceDDPMScheduler', now 'DDIMSched"):
        draw(pipe, 2, tmp_path)


def latents_pipeline():
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    return toy_pipeline(random_unet(in_channels=4, out_channels=8), vae=vae)


@pytest.mark.parametrize(
    "make,name,change",
    [
        (toy_pipeline, "unet", lambda unet: unet.register_to_config(sample_size=16)),
        (toy_pipeline, "unet", lambda unet: unet.register_to_config(timestep_scale=0.25)),
        (text_pipeline, "unet", lambda unet: unet.register_to_config(null_class_id=3)),
        (text_pipeline, "text_encoder", lambda encoder: setattr(encoder.config, "hidden_act", "relu")),
        (text_pipeline, "tokenizer", lambda tokenizer: setattr(tokenizer, "model_max_length", 5)),
        (latents_pipeline, "vae", lambda vae: vae.register_to_config(scaling_factor=0.5)),
        (class_pipeline, "classifier", lambda classifier: classifier.register_to_config(timestep_scale=0.25)),
    ],
)
def test_another_config_of_the_same_weights_is_refused(make, name, change, tmp_path):
    pipe = make()
    draw(pipe, 1, tmp_path, pipeline_options={"num_inference_steps": 1})
    change(getattr(pipe, name))
    digits = "'[0-9a-f]{32}'"
    with pytest.raises(ValueError, match=f"settings: `components` had {name}={digits}, now {digits}. Repeat"):
        draw(pipe, 2, tmp_path, pipeline_options={"num_inference_steps": 1})


def test_model_may_move(tmp_path):
    """Where it lies, and what was done with it before, is not a setting."""
    arguments = {"prompts": ["a cat", "the dog"], "class_labels": [1]}
    draw(text_pipeline(), 1, tmp_path / "out", **arguments)
    path = saved(text_pipeline(), tmp_path / "model")
    pipe = ADMPipeline.from_pretrained(path)
    pipe("a red cat on the mat", num_inference_steps=1)
    draw(pipe, 2, tmp_path / "out", **arguments)
    assert len(read(tmp_path / "out")) == 2


def test_settings_that_drew_nothing_do_not_bind(tmp_path):
    """A mistake that the pipeline finds is corrected in the same folder."""
    with pytest.raises(ValueError, match="no `class_labels`"):
        draw(class_pipeline(), 2, tmp_path, pipeline_options={"guidance_scale": 2.0})
    draw(class_pipeline(), 2, tmp_path)
    assert len(read(tmp_path)) == 2


# 3. The files


def test_folder_is_an_imagefolder(tmp_path):
    path = draw(text_pipeline(), 3, tmp_path, class_labels=[3, 1], prompts=["a cat", "the dög"])
    assert path == tmp_path
    data = datasets.load_dataset("imagefolder", data_dir=str(tmp_path), split="train", cache_dir=tmp_path / "cache")
    assert data.column_names == ["image", "label", "label_name", "text"]
    assert data["label"][:] == [3, 1, 3]
    assert data["label_name"][:] == ["fish", "cats", "fish"]
    assert data["text"][:] == ["a cat", "the dög", "a cat"]
    for image, pixels in zip(data["image"], read(tmp_path).values(), strict=True):
        assert np.array_equal(np.asarray(image), pixels)


def test_npz_is_that_of_guided_diffusion(tmp_path):
    draw(class_pipeline(), 5, tmp_path / "png", class_labels=range(4))
    path = draw(class_pipeline(), 5, tmp_path / "npz", class_labels=range(4), output_format="npz")
    assert path == tmp_path / "npz" / "samples.npz"
    assert {file.name for file in path.parent.iterdir()} == {"samples.npz", "sampling.json"}
    with np.load(path) as arrays:
        assert arrays.files == ["arr_0", "arr_1"]
        assert arrays["arr_0"].dtype == np.uint8
        assert levels_apart(arrays["arr_0"], np.stack(list(read(tmp_path / "png").values()))) <= 1
        assert arrays["arr_1"].tolist() == [0, 1, 2, 3, 0]

    stamp = path.stat().st_mtime_ns
    draw(class_pipeline(), 5, tmp_path / "npz", class_labels=range(4), output_format="npz")  # nothing is left to do
    assert path.stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="`num_images` is 6, but .* holds 5 images in samples.npz"):
        draw(class_pipeline(), 6, tmp_path / "npz", class_labels=range(4), output_format="npz")


@pytest.mark.parametrize("output_format", ["png", "npz"])
def test_grey_images(output_format, tmp_path):
    path = draw(toy_pipeline(random_unet(in_channels=1, out_channels=2)), 2, tmp_path, output_format=output_format)
    if output_format == "npz":
        with np.load(path) as arrays:
            assert arrays.files == ["arr_0"]
            assert arrays["arr_0"].shape == (2, 8, 8, 1)
    else:
        assert {Image.open(file).mode for file in tmp_path.glob("*.png")} == {"L"}
        assert not (tmp_path / "metadata.jsonl").exists()


def wide_pipeline(channels):
    return toy_pipeline(random_unet(in_channels=channels, out_channels=2 * channels))


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_any_number_of_channels_as_npz(channels, tmp_path):
    """Also after an interruption, and the same as the pipeline gives."""
    draw(wide_pipeline(channels), 3, tmp_path, batch_size=1, output_format="npz")
    with np.load(tmp_path / "samples.npz") as arrays:
        whole = arrays["arr_0"]
    assert {file.name for file in tmp_path.iterdir()} == {"samples.npz", "sampling.json"}
    generator = torch.Generator().manual_seed(derive_seed(0, "sample", 1))
    expected = wide_pipeline(channels)(generator=generator, output_type="np", **FEW_STEPS).images[0]
    assert np.array_equal(whole[1], (expected * 255).round().astype(np.uint8))

    pipe, calls = wide_pipeline(channels), []

    def fail(module, args):
        calls.append(args)
        if len(calls) == 2 * FEW_STEPS["num_inference_steps"]:
            raise KeyboardInterrupt

    pipe.unet.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        draw(pipe, 3, tmp_path / "again", batch_size=1, output_format="npz")
    draw(wide_pipeline(channels), 3, tmp_path / "again", batch_size=1, output_format="npz")
    assert len(calls) == 2 * FEW_STEPS["num_inference_steps"]
    with np.load(tmp_path / "again" / "samples.npz") as arrays:
        assert np.array_equal(arrays["arr_0"], whole)
    assert {file.name for file in (tmp_path / "again").iterdir()} == {"samples.npz", "sampling.json"}


def test_transparent_images(tmp_path):
    draw(wide_pipeline(4), 1, tmp_path / "png")
    draw(wide_pipeline(4), 1, tmp_path / "npz", output_format="npz")
    (pixels,) = read(tmp_path / "png").values()
    with np.load(tmp_path / "npz" / "samples.npz") as arrays:
        assert np.array_equal(arrays["arr_0"][0], pixels)


@pytest.mark.parametrize("channels", [2, 5, 13])
def test_channels_that_no_png_file_holds(channels, tmp_path):
    pipe, calls = wide_pipeline(channels), []
    pipe.unet.register_forward_pre_hook(lambda *args: calls.append(args))
    with pytest.raises(ValueError, match=f"'png', but the images have {channels} channels, .* Use 'npz'"):
        draw(pipe, 1, tmp_path / "out")
    assert calls == []
    assert not (tmp_path / "out").exists()


# Format, default format of files, dtype.
FORMATS = [
    (ImageFormat("RGB", 3), "png", np.uint8),
    (ImageFormat("L", 1), "png", np.uint8),
    (ImageFormat("L", 1, (0, 255), 2), "png", np.uint8),
    (ImageFormat("LA", 2), "png", np.uint8),
    (ImageFormat("RGBA", 4), "png", np.uint8),
    (ImageFormat("L", 1, (0, 4095), 4096), "png", np.uint16),
    (ImageFormat("L", 1, (0, 65535), 65536), "png", np.uint16),
    (ImageFormat("L", 1, (-1024, 3071), 4096), "tiff", np.int16),
    (ImageFormat("RGB", 3, (0, 65535), 65536), "tiff", np.uint16),
    (ImageFormat("RGBA", 4, (0, 65535), 65536), "tiff", np.uint16),
    (ImageFormat("array", 3), "tiff", np.uint8),
    (ImageFormat("array", 4, (0, 65535), 65536), "tiff", np.uint16),
    (ImageFormat("array", 5, (0, 10000), 10001), "tiff", np.uint16),
    (ImageFormat("array", 2, (-3.5, 12.25), None), "tiff", np.float32),
    (ImageFormat("L", 1, (0, 1), None), "tiff", np.float32),
]


def formatted_pipeline(image_format):
    """Of images that are not square."""
    unet = random_unet(sample_size=(8, 12), in_channels=image_format.channels, out_channels=2 * image_format.channels)
    return toy_pipeline(unet, image_format=image_format.to_config())


@pytest.mark.parametrize("output_format", ["tiff", "npz"])
@pytest.mark.parametrize(
    "image_format",
    [
        ImageFormat("RGBA", 4, (0, 4095), 4096),
        ImageFormat("LA", 2, (0, 127), 128),
        ImageFormat("RGBA", 4, (-1024, 3071), 4096),
        ImageFormat("RGBA", 4, (-60, 60), None),
    ],
    ids=str,
)
def test_opaque_is_opaque_to_viewers(image_format, output_format, tmp_path):
    """Alpha fills the range of the type in files, and the value range in data, in both directions."""
    low, high = image_format.value_range
    pipe = formatted_pipeline(image_format)
    fractions = np.random.default_rng(0).random((1, 8, 12, image_format.channels), dtype=np.float32)
    fractions[..., :4, -1], fractions[..., 4:6, -1] = 1, 0
    data = image_format.from_unit(torch.from_numpy(fractions)).numpy()
    images = fractions if image_format.is_viewable else data

    class Fixed(type(pipe)):
        def __call__(self, batch_size=1, generator=None, output_type="np", num_inference_steps=1):
            return ImagePipelineOutput(images=images)

    pipe.__class__ = Fixed
    folder = draw(pipe, 1, tmp_path / "out", output_format=output_format)
    if output_format == "npz":
        with np.load(folder) as arrays:
            stored = arrays["arr_0"][0]
        image = stored
    else:
        image = {"path": str(folder / "000000.tiff"), "bytes": None}
        stored = tifffile.imread(image["path"])
    opaque = {"f": 1}.get(stored.dtype.kind) or np.iinfo(stored.dtype).max
    assert set(stored[:, :4, -1].ravel()) == {opaque}
    assert set(stored[:, 4:6, -1].ravel()) == {0}
    np.testing.assert_allclose(stored[..., :-1], data[0, ..., :-1], rtol=0, atol=1e-4)
    np.testing.assert_allclose(decode_image(image, image_format), data[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("image_format,suffix,dtype", FORMATS, ids=lambda value: str(value))
def test_files_hold_values_of_the_data(image_format, suffix, dtype, tmp_path):
    """Of any format, in each form that holds it, also after an interruption."""
    pipe, low, high = formatted_pipeline(image_format), *image_format.value_range
    generators = [torch.Generator().manual_seed(derive_seed(0, "sample", i)) for i in range(3)]
    expected = pipe(generator=generators, batch_size=3, output_type="np", **FEW_STEPS).images
    if image_format.is_viewable:
        steps = image_format.num_levels - 1
        expected = np.round(expected.astype(np.float64) * steps) * (high - low) / steps
    assert expected.min() >= low
    assert expected.max() <= high
    tolerance = 1e-5 * (high - low)  # sums in another order, in batches of another size
    if image_format.num_levels is not None:
        tolerance += (high - low) / (image_format.num_levels - 1)

    folder = draw(pipe, 3, tmp_path / "single", class_labels=None)
    names = sorted(path.name for path in folder.iterdir())
    assert names == [*(f"00000{index}.{suffix}" for index in range(3)), "sampling.json"]
    stored = json.loads((folder / "sampling.json").read_text())["settings"]
    assert stored["image_format"] == image_format.to_config()
    assert stored["output_format"] == suffix
    (folder / f"000001.{suffix}").unlink()
    draw(pipe, 3, folder, batch_size=1)
    for index in range(3):
        with open_image(
            {"path": str(folder / f"00000{index}.{suffix}"), "bytes": None}, image_format.channels
        ) as image:
            pixels = image.read()
            assert (image.mode, image.dtype) == (image_format.mode, dtype)
        assert pixels.shape == (8, 12, image_format.channels)
        assert np.abs(pixels.astype(np.float64) - expected[index]).max() <= tolerance

    draw(pipe, 3, tmp_path / "packed", output_format="npz")
    assert {path.name for path in (tmp_path / "packed").iterdir()} == {"samples.npz", "sampling.json"}
    with np.load(tmp_path / "packed" / "samples.npz") as arrays:
        assert arrays["arr_0"].dtype == dtype
        assert np.abs(arrays["arr_0"] - expected).max() <= tolerance

    if suffix == "tiff":
        steps = []
        pipe.unet.register_forward_pre_hook(lambda *args: steps.append(args))
        with pytest.raises(ValueError, match="`output_format` is 'png', but .* Use 'tiff' or 'npz'"):
            draw(pipe, 3, tmp_path / "refused", output_format="png")
        assert not steps
        assert not (tmp_path / "refused").exists()
    else:
        folder = draw(pipe, 1, tmp_path / "chosen", output_format="tiff")
        with open_image({"path": str(folder / "000000.tiff"), "bytes": None}) as image:
            assert (image.mode, image.dtype) == (image_format.mode, dtype)
            assert np.abs(image.read().astype(np.float64) - expected[0]).max() <= tolerance


def test_another_format_is_another_run(tmp_path):
    draw(formatted_pipeline(ImageFormat("L", 1)), 2, tmp_path)
    with pytest.raises(ValueError, match="`image_format` had value_range="):
        draw(formatted_pipeline(ImageFormat("L", 1, (0, 4095), 4096)), 3, tmp_path)


def test_metadata_name_the_files(tmp_path):
    unet = random_unet(in_channels=5, out_channels=10, **CONDITIONAL)
    pipe = toy_pipeline(unet, NAMES, image_format=ImageFormat("array", 5, (0, 1), None).to_config())
    draw(pipe, 2, tmp_path, class_labels=[2, 0])
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert [(row["file_name"], row["label"]) for row in rows] == [("000000.tiff", 2), ("000001.tiff", 0)]
    assert {path.name for path in tmp_path.glob("0*")} == {"000000.tiff", "000001.tiff"}


def test_tiff_says_what_it_needs(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tifffile" else find_spec(name))
    with pytest.raises(ImportError, match=r"tifffile.*diffusers-adm\[eval\]"):
        draw(formatted_pipeline(ImageFormat("array", 5, (0, 1), None)), 1, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command_writes_what_the_model_was_trained_on(tmp_path):
    model = saved(formatted_pipeline(ImageFormat("L", 1, (0, 4095), 4096)), tmp_path / "model")
    run(model=model, num_images=2, output_dir=tmp_path / "out", num_inference_steps=2)
    pixels = read(tmp_path / "out")["000000.png"]
    assert pixels.dtype == np.uint16
    assert 255 < pixels.max() <= 4095
    run(model=model, num_images=1, output_dir=tmp_path / "tiff", num_inference_steps=2, output_format="tiff")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "tiff" / "000000.tiff")), pixels)


def test_a_command_that_fails_leaves_no_settings(tmp_path):
    """Those of a run with images stay, and so does what tells of them."""
    draw(class_pipeline(), 2, tmp_path, class_labels=[1])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    pipe = class_pipeline()
    pipe.unet.register_forward_pre_hook(lambda *args: 1 / 0)
    for folder in (tmp_path / "new", tmp_path):
        with pytest.raises(ZeroDivisionError):
            draw(pipe, 3, folder, class_labels=[1])
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "new").rmdir()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    draw(class_pipeline(), 3, tmp_path, class_labels=[1])
    assert json.loads((tmp_path / "sampling.json").read_text())["num_images"] == 3


def test_bar_of_the_pipeline_is_as_before(tmp_path, capfd):
    pipe = toy_pipeline()
    pipe.set_progress_bar_config(desc="mine")
    draw(pipe, 3, tmp_path, batch_size=2, progress_bar=True)
    bars = [line for line in capfd.readouterr().err.replace("\r", "\n").splitlines() if line]
    assert bars
    assert all("Sampling" in line and "/3" in line for line in bars)
    assert "3/3" in bars[-1]
    assert pipe._progress_bar_config == {"desc": "mine"}


# 4. Bad input


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"num_images": 0}, "`num_images` is 0"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"class_labels": []}, r"`class_labels` is \[\]"),
        ({"prompts": "a cat"}, "`prompts` is 'a cat'; pass a list"),
        ({"output_format": "jpg"}, "`output_format` is 'jpg'"),
        ({"pipeline_options": {"generator": None}}, "`generator` cannot be passed on .* made for each batch"),
        ({"pipeline_options": {"jump_length": 1}}, "`jump_length` cannot be passed on .* does not take it"),
        ({"pipeline_options": {"prompt_embeds": torch.zeros(1, 2, 3)}}, "`prompt_embeds` is a tensor"),
        ({"pipeline_options": {"image": np.zeros((8, 8, 3))}}, "`image` is a ndarray; .* are plain values"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        draw(**{"pipe": toy_pipeline(), "num_images": 1, "output_dir": tmp_path / "out", **arguments})
    assert not (tmp_path / "out").exists()


def test_a_compiled_network_goes_on(tmp_path):
    pipe = toy_pipeline()
    draw(pipe, 1, tmp_path)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    draw(pipe, 2, tmp_path)
    assert len(read(tmp_path)) == 2


def test_folder_of_other_images(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "000003.png")
    with pytest.raises(ValueError, match="holds images, but no sampling.json"):
        draw(toy_pipeline(), 1, tmp_path)


def test_fewer_images_than_there_are(tmp_path):
    draw(toy_pipeline(), 3, tmp_path)
    with pytest.raises(ValueError, match="`num_images` is 2, but .* up to number 2. Ask for at least 3"):
        draw(toy_pipeline(), 2, tmp_path)


def test_images_that_are_no_numbers(tmp_path):
    pipe = toy_pipeline()
    pipe.unet.conv_out.bias.data[0] = torch.nan
    with pytest.raises(RuntimeError, match="Image 0 holds .* not finite. Weights of `unet` .*conv_out.bias"):
        draw(pipe, 1, tmp_path)
    assert not read(tmp_path)


# 5. The command


def settings(folder):
    return json.loads((folder / "sampling.json").read_text())["settings"]


def labels(folder):
    return [json.loads(line).get("label") for line in (folder / "metadata.jsonl").read_text().splitlines()]


def test_options_reach_the_pipeline(stock, tmp_path, capsys):
    options = {
        "num_inference_steps": 4,
        "guidance_scale": 2.5,
        "guidance_start": 0.25,
        "guidance_end": 0.75,
        "guidance_rescale": 0.5,
        "classifier_guidance_scale": 1.5,
        "eta": 0.5,
    }
    run(
        **options,
        model=stock / "classes",
        num_images=2,
        output_dir=tmp_path,
        class_labels=2,
        classifier=stock / "classifier",
        scheduler="DDIMScheduler",
    )
    assert options.items() <= settings(tmp_path).items()
    assert settings(tmp_path)["scheduler"]["_class_name"] == "DDIMScheduler"
    assert "2 images in" in capsys.readouterr().out
    pipe = class_pipeline()
    pipe.classifier = random_classifier(seed=7, num_classes=4)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    generators = [torch.Generator().manual_seed(derive_seed(0, "sample", i)) for i in range(2)]
    expected = pipe(class_labels=[2, 2], generator=generators, **options).images
    for pixels, image in zip(read(tmp_path).values(), expected, strict=True):
        assert levels_apart(pixels, np.asarray(image)) <= 1


@pytest.mark.parametrize(
    "class_labels,expected",
    [("uniform", [0, 1, 2, 3, 0, 1]), ("dogs", [2] * 6), ("3", [3] * 6)],
)
def test_class_labels(class_labels, expected, stock, tmp_path):
    run(
        model=stock / "classes",
        num_images=6,
        output_dir=tmp_path,
        class_labels=class_labels,
        num_inference_steps=1,
    )
    assert labels(tmp_path) == expected


def test_classes_as_in_the_data(stock, tmp_path):
    """By name: without "birds" and "cats" the folders alone would make fish the second class."""
    for name, count in {"fish": 5, "dogs": 2, "elsewhere/birds": 1}.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (8, 8)).save(tmp_path / "data" / name / f"{index}.png")
    arguments = {"model": stock / "classes", "class_labels": "data", "dataset": tmp_path / "data"}
    arguments |= {"num_inference_steps": 1, "num_images": 16}
    run(**arguments, output_dir=tmp_path / "out")
    drawn = labels(tmp_path / "out")
    for once in (drawn[:8], drawn[8:]):
        assert [once.count(label) for label in range(4)] == [1, 0, 2, 5]
    assert drawn[:8] == drawn[8:] != sorted(drawn[:8])
    run(**arguments, output_dir=tmp_path / "other", seed=1)
    assert labels(tmp_path / "other") != drawn


def test_classes_of_the_classifier_alone(stock, tmp_path):
    """An unconditional network, steered; the classifier's names serve both."""
    for name in ("fish", "birds"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / name / "0.png")
    arguments = {"model": stock / "plain", "classifier": stock / "named", "num_inference_steps": 2, "num_images": 6}
    steered = {**arguments, "classifier_guidance_scale": 5}
    run(**steered, class_labels="uniform", output_dir=tmp_path / "uniform")
    assert labels(tmp_path / "uniform") == [0, 1, 2, 3, 0, 1]
    run(**steered, class_labels="data", dataset=tmp_path / "data", output_dir=tmp_path / "as-data")
    assert sorted(labels(tmp_path / "as-data")) == [0, 0, 0, 3, 3, 3]
    run(**steered, class_labels="fish", output_dir=tmp_path / "one")
    assert labels(tmp_path / "one") == [3] * 6
    drawn, other = read(tmp_path / "uniform"), read(tmp_path / "one")
    assert [levels_apart(drawn[name], other[name]) <= 1 for name in drawn] == [False] * 3 + [True] + [False] * 2
    with pytest.raises(ValueError, match="'uniform', but the network is unconditional and nothing guides"):
        run(**arguments, class_labels="uniform", output_dir=tmp_path / "unsteered")


def test_prompts_from_a_file_in_half_precision(stock, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\n  the dog \n", encoding="utf-8")
    run(
        model=stock / "text",
        num_images=3,
        output_dir=tmp_path / "out",
        prompts_file=tmp_path / "prompts.txt",
        negative_prompt="green",
        guidance_scale=2,
        timestep_respacing="ddim2",
        dtype="bfloat16",
        output_format="npz",
    )
    found = settings(tmp_path / "out")
    assert found["prompts"] == ["a cat", "the dog"]
    assert found["dtype"] == "bfloat16"
    assert found["timestep_respacing"] == "ddim2"
    assert found["negative_prompt"] == "green"
    with np.load(tmp_path / "out" / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (3, 8, 8, 3)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"model": "nowhere"}, "`model` is 'nowhere'"),
        (
            {"classifier": "nowhere", "classifier_guidance_scale": 1},
            "`classifier` is 'nowhere', which is no file or folder",
        ),
        (
            {"classifier": "{path}/turned", "classifier_guidance_scale": 1},
            "Class 0 of `classifier` '.*/turned' is 'fish', but that of .* is 'birds'",
        ),
        ({"num_images": 0}, "`num_images` is 0"),
        ({"class_labels": "horses"}, "`class_labels` is 'horses'. .* birds, cats, dogs, fish"),
        ({"class_labels": "data"}, "needs a `--dataset`"),
        ({"dataset": "here"}, "needs a `--dataset`"),
        ({"class_labels": "uniform", "model": "{path}/plain"}, "no class embedding table"),
        ({"scheduler": "DDIMSheduler"}, "`scheduler` is 'DDIMSheduler'.*DDIMScheduler"),
        ({"prompt": "a", "prompts_file": "b"}, "Pass one of them"),
        ({"prompts_file": "nowhere.txt"}, "`prompts_file` is 'nowhere.txt'"),
        ({"prompts_file": "{path}/empty.txt"}, "holds no prompts"),
        ({"guidance_scale": 2}, "`guidance_scale` is 2"),
        ({"output_dir": "{path}/empty.txt"}, "`output_dir` is .*empty.txt is not a directory. Name another"),
        ({"output_dir": "{path}/empty.txt/out", "model": "nowhere"}, "empty.txt is not a directory"),
        ({"scheduler": "DDIMSheduler", "model": "nowhere"}, "`scheduler` is 'DDIMSheduler'"),
        ({"prompts_file": "nowhere.txt", "model": "nowhere"}, "`prompts_file` is 'nowhere.txt'"),
    ],
)
def test_wrong_arguments(arguments, message, stock, tmp_path):
    (stock / "empty.txt").write_text("\n")
    arguments = {"model": "{path}/classes", "num_images": 1, "output_dir": tmp_path / "out", **arguments}
    arguments = {n: v.format(path=stock) if isinstance(v, str) else v for n, v in arguments.items()}
    with pytest.raises(ValueError, match=message):
        run(**arguments)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_every_process_says_why(stock, tmp_path):
    """What the main process finds in the folder, or that it cannot make it, ends all of them, with the same words."""
    arguments = {"model": stock / "plain", "num_images": 1, "num_inference_steps": 1}
    run(**arguments, output_dir=tmp_path / "out")
    (tmp_path / "file").touch()
    cases = [flags(**arguments, output_dir=tmp_path / name, seed=1) for name in ("out", "file/out")]
    found = run_distributed(refusals, cases)
    assert found[0] == found[1]
    assert "`seed` was 0 and is now 1" in found[0][0]
    assert "file is not a directory" in found[0][1]


def refusals(cases):
    found = []
    for arguments in cases:
        try:
            main(arguments)
        except (OSError, ValueError) as error:
            found.append(str(error))
    return found
