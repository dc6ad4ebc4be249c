"""8-bit images that show samples of any format, against Pillow and diffusers."""

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from diffusers_adm.conditioning.image_format import ImageFormat
from diffusers_adm.training import describe_preview, labelled_grid, preview
from diffusers_adm.training.validation import from_pipeline, same_size, to_pipeline


BANDS = ImageFormat("array", 5, (0, 1), None)
PAIR = ImageFormat("array", 2, (-3, 3), None)
DEEP = ImageFormat("L", 1, (0, 4095), 4096)


def samples_of(channels, size=(4, 6)):
    return (
        2.4 * torch.rand(2, channels, *size, generator=torch.Generator().manual_seed(channels)) - 1.2
    )  # to be clipped


def pixels_of(images):
    return np.stack([np.asarray(image) for image in images])


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1)])
def test_pictures_are_as_pipelines_of_diffusers_give_them(mode, channels):
    samples = samples_of(channels)
    expected = VaeImageProcessor(vae_scale_factor=1).postprocess(samples, output_type="pil")
    images = preview(samples, ImageFormat(mode, channels))
    assert [image.mode for image in images] == [mode] * 2
    assert np.array_equal(pixels_of(images), pixels_of(expected))
    assert describe_preview(ImageFormat(mode, channels)) is None


def test_transparency_is_laid_on_white():
    samples = samples_of(4).clamp(-1, 1)
    rgba = ((samples / 2 + 0.5) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    white = Image.new("RGBA", (6, 4), "white")
    expected = [Image.alpha_composite(white, Image.fromarray(image)).convert("RGB") for image in rgba]
    images = preview(samples, ImageFormat("RGBA", 4))
    assert np.abs(pixels_of(images).astype(int) - pixels_of(expected)).max() <= 1  # the rounding of Pillow
    assert describe_preview(ImageFormat("RGBA", 4)) == "on white"
    assert preview(samples[:, :2], ImageFormat("LA", 2))[0].mode == "L"


def test_deep_images_are_scaled_to_8_bits():
    (image,) = preview(torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 1, 1, 3), DEEP)
    assert np.asarray(image).tolist() == [[0, 128, 255]]
    assert describe_preview(DEEP) == "scaled to 8 bits"


@pytest.mark.parametrize(
    ("image_format", "channels", "mode", "size", "caption"),
    [
        (BANDS, None, "RGB", (6, 4), "channels 1, 2, 3 as red, green, blue, from 0 (0) to 1 (255)"),
        (BANDS, [5, 1, 2], "RGB", (6, 4), "channels 5, 1, 2 as red, green, blue, from 0 (0) to 1 (255)"),
        (BANDS, [4], "L", (6, 4), "channel 4 in grey, from 0 (0) to 1 (255)"),
        (BANDS, [1, 2, 4, 5], "L", (27, 4), "channels 1, 2, 4, 5 in grey, side by side, from 0 (0) to 1 (255)"),
        (PAIR, None, "L", (13, 4), "channels 1, 2 in grey, side by side, from -3 (0) to 3 (255)"),
        (ImageFormat(), [2], "L", (6, 4), "channel 2 in grey, from 0 (0) to 255 (255)"),
    ],
)
def test_channels(image_format, channels, mode, size, caption):
    samples = samples_of(image_format.channels)
    images = preview(samples, image_format, channels)
    assert (images[0].mode, images[0].size) == (mode, size)
    numbers = channels or list(range(1, min(3, image_format.channels) + 1))
    levels = [((samples[:, n - 1] + 1) * 127.5).clamp(0, 255).round().numpy() for n in numbers]
    pixels = pixels_of(images)
    for place, level in enumerate(levels):
        shown = pixels[..., place] if mode == "RGB" else pixels[:, :, 7 * place : 7 * place + 6]
        assert np.abs(shown - level).max() <= 1  # halves
    if len(numbers) not in (1, 3):
        assert (pixels[:, :, 6::7] == 255).all()  # between the channels
    assert describe_preview(image_format, channels) == caption


@pytest.mark.parametrize("channels", [[0], [6], [1, 2, -1]])
def test_channels_that_there_are_not(channels):
    with pytest.raises(ValueError, match="but the images have 5 channels. Count from 1 to 5"):
        preview(samples_of(5), BANDS, channels)


def test_the_only_channel():
    with pytest.raises(ValueError, match="but the images have 1 channel. Pass 1, or leave it out"):
        preview(samples_of(1), ImageFormat("L", 1), [2])


@pytest.mark.parametrize("image_format", [BANDS, DEEP, ImageFormat()])
def test_the_way_to_a_pipeline_and_back(image_format):
    samples = samples_of(image_format.channels).clamp(-1, 1)
    values = to_pipeline(samples, image_format)
    low, high = (0, 1) if image_format.is_viewable else image_format.value_range
    assert low <= values.min() <= values.max() <= high
    levels = image_format.num_levels
    tolerance = 1e-6 if levels is None else 1 / (levels - 1) + 1e-6  # rounded to a level
    torch.testing.assert_close(from_pipeline(values, image_format), samples, rtol=0, atol=tolerance)


def test_a_caption_below_a_grid():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8))
    plain, captioned = (
        np.asarray(labelled_grid([image] * 20, 2, 10, caption=caption)) for caption in (None, "a caption")
    )
    assert captioned.shape[1] == plain.shape[1]
    assert np.array_equal(captioned[: len(plain)], plain)
    assert captioned[len(plain) :].min() < 100
    long = np.asarray(labelled_grid([image], 1, 1, caption="words that need more than one line " * 2))
    assert long.shape[1] == 160
    assert len(long) > labelled_grid([image], 1, 1, caption="one").height


def test_columns_of_several_sizes():
    small, wide = Image.new("L", (4, 4), 9), Image.new("RGB", (9, 4), "red")
    placed = same_size({"a": [small], "b": [wide]})
    assert placed["a"][0].size == placed["b"][0].size == (9, 4)
    assert (placed["a"][0].getpixel((0, 0)), placed["a"][0].getpixel((8, 0))) == ((9, 9, 9), (255, 255, 255))
    assert same_size({"a": [small]}) == {"a": [small]}
