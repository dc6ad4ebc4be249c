"""Resizing and cropping: 8 bits as Pillow does, other values as torch does, and sizes that are not square."""

import io
import random

import datasets
import imagecodecs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from diffusers_adm.conditioning.image_format import ImageFormat
from diffusers_adm.data.checks import check_images
from diffusers_adm.data.images import ImageDataset
from diffusers_adm.data.resizing import Window
from diffusers_adm.data.seeding import derive_seed


DEEP = {mode: ImageFormat(mode, channels, (0, 65535), 65536) for mode, channels in (("L", 1), ("RGB", 3), ("RGBA", 4))}
DEEP["LA"] = ImageFormat("LA", 2, (0, 65535), 65536)


def smooth(size, channels, seed=0):
    """Values in [0, 1]: waves, and noise of a tenth."""
    generator = np.random.default_rng(seed)
    y, x = np.meshgrid(*(np.linspace(0, 3, side) for side in size), indexing="ij")
    phases = generator.random(channels) * 6
    return 0.45 + 0.4 * np.sin((x * y)[..., None] + phases) + 0.1 * generator.random((*size, channels))


def encoded(values):
    file = io.BytesIO()
    if values.dtype.kind == "f" or values.shape[-1] > 4:
        np.save(file, values)
    else:
        file.write(imagecodecs.png_encode(values[..., 0] if values.shape[-1] == 1 else values))
    return {"bytes": file.getvalue(), "path": None}


def from_values(*values):
    features = datasets.Features({"image": datasets.Image(decode=False)})
    return datasets.Dataset.from_dict({"image": list(map(encoded, values))}, features=features)


def plain_pillow(values, size, epoch, center_crop, random_flip, seed=0):
    """8-bit RGB of a square size, written out: shorter side to the size, crop, flip."""
    image = Image.fromarray(values)
    generator = random.Random(derive_seed(seed, "augmentation", epoch, 0))
    x, y, flip = generator.random(), generator.random(), generator.random() < 0.5
    x, y = (0.5, 0.5) if center_crop else (x, y)
    shorter = min(image.size)
    width, height = (max(size, round(side * (size / shorter))) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = int(x * (width - size + 1)), int(y * (height - size + 1))
    image = image.crop((left, top, left + size, top + size))
    if random_flip and flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def reference(values, size):
    """Bicubic, antialiased, by torch, in float64; not clipped."""
    samples = torch.from_numpy(values.astype(np.float64)).permute(2, 0, 1)[None]
    return F.interpolate(samples, size=size, mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()


def resized(values, size, image_format):
    (example,) = ImageDataset(from_values(values), size, center_crop=True, image_format=image_format)
    return image_format.to_values(example["images"].double()).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("shape", [(16, 16), (40, 29), (33, 71), (9, 12)])
@pytest.mark.parametrize("image_format", [None, ImageFormat()])
def test_eight_bit_colour_is_bit_for_bit_as_with_pillow_alone(shape, image_format):
    values = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    for center_crop in (True, False):
        dataset = ImageDataset(from_values(values), 16, center_crop, random_flip=True, image_format=image_format)
        for epoch in range(6):
            dataset.set_epoch(epoch)
            assert torch.equal(dataset[0]["images"], plain_pillow(values, 16, epoch, center_crop, True))


class TestOtherDepths:
    @pytest.mark.parametrize("mode,channels", [("L", 1), ("RGB", 3)])
    @pytest.mark.parametrize("size", [(16, 24), (64, 96)])
    def test_sixteen_bits(self, mode, channels, size):
        """float32 and rounding to levels: half a level, and a few of float32's rounding errors of 65535 / 2^24."""
        values = (smooth((32, 48), channels) * 65535).round().astype(np.uint16)
        found = resized(values, size, DEEP[mode])
        np.testing.assert_array_equal(found, found.round())
        np.testing.assert_allclose(found, reference(values, size).clip(0, 65535), rtol=0, atol=0.6)

    @pytest.mark.parametrize("size", [(16, 24), (64, 96)])
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize("offset", [0, 1000])
    def test_floating_point_numbers(self, size, dtype, offset):
        values = smooth((32, 48), 5).astype(dtype) + dtype(offset)
        image_format = ImageFormat("array", 5, (offset, offset + 1), None)
        expected = reference(values, size).clip(offset, offset + 1)
        np.testing.assert_allclose(resized(values, size, image_format), expected, rtol=0, atol=1e-6)

    def test_values_stay_in_the_range_and_on_its_levels(self):
        """Bicubic filters overshoot at edges."""
        values = np.zeros((16, 16, 5), np.uint8)
        values[:, 8:] = 9
        image_format = ImageFormat("array", 5, (0, 9), 10)
        assert reference(values, (23, 23)).max() > 9.1
        found = resized(values, 23, image_format)
        assert (found.min(), found.max()) == (0, 9)
        np.testing.assert_array_equal(found, found.round())

    @pytest.mark.parametrize("mode,channels", [("LA", 2), ("RGBA", 4)])
    def test_hidden_colours_do_not_leak(self, mode, channels):
        """The colours of transparent pixels do not show, as with Pillow's 8 bits."""
        values = (smooth((32, 48), channels) * 255).round().astype(np.uint8)
        values[..., -1] = np.where(np.arange(48) < 24, 255, 0)
        values[:, 24:, :-1] = 255 - values[:, 24:, :-1]  # hidden
        found = resized(values.astype(np.uint16) * 257, (16, 24), DEEP[mode]) / 257
        eight = resized(values, (16, 24), ImageFormat(mode, channels))
        np.testing.assert_allclose(found[..., -1], eight[..., -1], atol=1)
        # Pillow divides 8-bit numbers by alpha: where it is small, by as much as these allow.
        visible = eight[..., -1] > 64
        np.testing.assert_allclose(found[visible][:, :-1], eight[visible][:, :-1], atol=4)
        assert (found[..., :-1][found[..., -1] == 0] == 0).all()

    def test_no_resizing_if_the_size_is_right(self):
        values = np.random.default_rng(0).integers(0, 65536, (16, 30, 1), dtype=np.uint16)
        np.testing.assert_array_equal(resized(values, 16, DEEP["L"]), values[:, 7:23])


class TestSizes:
    @pytest.mark.parametrize("size", [(16, 32), (32, 16), (12, 12)])
    @pytest.mark.parametrize("shape", [(40, 40), (16, 32), (17, 90), (90, 17), (8, 16)])
    @pytest.mark.parametrize("image_format", [ImageFormat(), DEEP["L"]])
    def test_the_image_covers_the_size_and_keeps_its_aspect(self, size, shape, image_format):
        (height, width), (image_height, image_width) = size, shape
        for x, y in ((0, 0), (0.5, 0.5), (0.999, 0.999)):
            window = Window.place(shape[::-1], size, x, y, flip=False)
            resized_width, resized_height = window.resized
            assert min(resized_width - width, resized_height - height) == 0
            # One scale brings both sides within half a pixel.
            scale = max(height / image_height, width / image_width)
            assert abs(resized_width - image_width * scale) <= 0.5
            assert abs(resized_height - image_height * scale) <= 0.5
            assert 0 <= window.left <= resized_width - width
            assert 0 <= window.top <= resized_height - height
        assert (window.left, window.top) == (resized_width - width, resized_height - height)
        channels = image_format.channels
        values = np.zeros((*shape, channels), image_format.dtype)
        (example,) = ImageDataset(from_values(values), size, image_format=image_format)
        assert example["images"].shape == (channels, *size)

    def test_crops_move_along_the_longer_side_only(self):
        values = np.arange(24, dtype=np.uint16).repeat(48).reshape(24, 48, 1) * 1000  # row y holds 1000 y
        dataset = ImageDataset(from_values(values), (16, 48), random_flip=True, image_format=DEEP["L"])
        tops = set()
        for epoch in range(100):
            dataset.set_epoch(epoch)
            found = DEEP["L"].to_values(dataset[0]["images"])[0].numpy()
            top = found[0, 0] / 1000
            np.testing.assert_array_equal(found, values[int(top) : int(top) + 16, :, 0])
            tops.add(top)
        assert tops == set(range(9))

    def test_too_small_is_half_of_each_side(self):
        shapes = [(8, 16), (7, 16), (8, 15), (7, 64), (64, 64)]
        dataset = from_values(*(np.zeros((*shape, 3), np.uint8) for shape in shapes))
        assert check_images(dataset, (16, 32))[1] == {"too small": ["row 1", "row 2", "row 3"]}
        assert check_images(dataset, (16, 32), min_image_size=8)[1] == {"too small": ["row 1", "row 3"]}
        assert check_images(dataset, 16)[1] == {"too small": ["row 1", "row 3"]}

    def test_the_message_names_both_sides(self, tmp_path):
        dataset = from_values(np.zeros((20, 30, 3), np.uint8), np.zeros((4, 30, 3), np.uint8))
        check_images(dataset, (16, 48), output_dir=tmp_path)
        assert "4 x 30 pixels (height x width), below 8 x 24" in (tmp_path / "skipped_images.txt").read_text()
        with pytest.raises(
            ValueError,
            match=r"2 too small. The first is row 0 \(too small: 20 x 30 pixels \(height x width\), below 64 x 48\). "
            "`min_image_size` is 64 x 48 for a resolution of 128 x 96",
        ):
            check_images(dataset, (128, 96))

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_workers_give_the_same(self, num_workers):
        values = [(smooth((20, 33), 5, seed) * 1000).astype(np.float32) for seed in range(4)]
        image_format = ImageFormat("array", 5, (-100, 1200), None)
        dataset = ImageDataset(from_values(*values), (8, 12), image_format=image_format)
        loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=num_workers)
        for index, example in enumerate(loader):
            assert torch.equal(example["images"], dataset[index]["images"])
