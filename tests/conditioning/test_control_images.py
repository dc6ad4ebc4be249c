"""Conditioning images against drawings whose outcome is known, brute force, and Pillow's own filters."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_adm.conditioning.control_images import CONDITIONS, condition_format_of, make_condition
from diffusers_adm.conditioning.image_format import ImageFormat
from diffusers_adm.conditioning.low_resolution import downsample


KINDS = list(CONDITIONS)


def random_levels(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def to_tensor(levels):
    return torch.from_numpy(np.ascontiguousarray(levels.transpose(2, 0, 1))).float() / 255


def to_levels(condition):
    return np.rint(condition.numpy().transpose(1, 2, 0) * 255).astype(int)


def drawing(height, width, seed=0):
    """A few flat, overlapping boxes: borders, corners and flat areas."""
    generator = np.random.default_rng(seed)
    levels = np.full((height, width, 3), 255, dtype=np.uint8)
    for _ in range(4):
        y, x = generator.integers(0, height), generator.integers(0, width)
        levels[y : y + height // 2, x : x + width // 2] = generator.integers(0, 256, 3)
    return levels


def areas(key):
    """Number of the connected area (by sides) of each pixel, by flood filling: `key` holds one value a pixel."""
    height, width = key.shape
    number = np.full((height, width), -1)
    count = 0
    for start in np.ndindex(height, width):
        if number[start] >= 0:
            continue
        stack = [start]
        number[start] = count
        while stack:
            y, x = stack.pop()
            for v, u in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                inside = 0 <= v < height and 0 <= u < width
                if inside and number[v, u] < 0 and key[v, u] == key[y, x]:
                    number[v, u] = count
                    stack.append((v, u))
        count += 1
    return number


def areas_of_colors(levels):
    return areas(levels.astype(int) @ [65536, 256, 1])


class TestAllKinds:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("size", [(1, 1), (1, 6), (2, 2), (3, 7), (33, 50), (64, 9), (32, 32)])
    def test_shape_type_and_values(self, kind, size):
        image = to_tensor(random_levels(*size))
        before = image.clone()
        condition = make_condition(image, kind)
        assert (condition.shape, condition.dtype) == (image.shape, torch.float32)
        assert condition.is_contiguous()
        assert torch.equal(condition, torch.from_numpy(to_levels(condition).transpose(2, 0, 1)).float() / 255)
        assert 0 <= condition.min() <= condition.max() <= 1
        assert torch.equal(image, before)
        assert torch.equal(condition, CONDITIONS[kind](image))

    @pytest.mark.parametrize("kind", KINDS)
    def test_pictures_tensors_and_targets_of_training_give_the_same(self, kind):
        """A mirrored drawing has edges of exactly equal strength, which the last bit of a number would decide."""
        levels = drawing(32, 16)
        levels = np.concatenate([levels, levels[:, ::-1]], axis=1)
        expected = make_condition(to_tensor(levels), kind)
        picture = make_condition(Image.fromarray(levels), kind)
        assert (picture.mode, picture.size) == ("RGB", (32, 32))
        assert torch.equal(to_tensor(np.asarray(picture)), expected)
        target = to_tensor(levels) * 255 / 127.5 - 1
        assert torch.equal(make_condition(((target + 1) / 2).clamp(0, 1), kind), expected)

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_grey_picture_counts_as_colour(self, kind):
        grey = Image.fromarray(random_levels(12, 12)[..., 0])
        assert make_condition(grey, kind).tobytes() == make_condition(grey.convert("RGB"), kind).tobytes()

    @pytest.mark.parametrize("kind", KINDS)
    def test_channels_rows_and_columns_are_not_mixed_up(self, kind):
        levels = np.full((24, 40, 3), 30, dtype=np.uint8)
        levels[:8, 28:, 0] = 240  # red, at the top right
        condition = make_condition(to_tensor(levels), kind)
        if kind == "edges":
            assert condition[0, 1:8, 27:29].any()
            assert not condition[:, 10:].any()
            assert not condition[:, :, :26].any()
        else:
            assert condition[0, 2, 36] > 0.9
            assert condition[1:].max() < 0.13
            assert condition[0, 14:].max() < 0.13
            assert condition[0, :, :20].max() < 0.13


class TestEdges:
    def edges(self, levels):
        condition = make_condition(to_tensor(levels), "edges")
        assert torch.equal(condition[0], condition[1])
        assert torch.equal(condition[0], condition[2])
        assert set(condition.unique().tolist()) <= {0.0, 1.0}
        return condition[0].numpy() == 1

    def test_a_square_whose_outline_is_halfway_has_its_edges_there(self):
        """Black, a line of the mean, white: the gradient has its one maximum on the line."""
        levels = np.zeros((20, 20, 3), dtype=np.uint8)
        levels[5:15, 5:15] = 128
        levels[6:14, 6:14] = 255
        outline = np.zeros((20, 20), dtype=bool)
        outline[5:15, 5:15] = True
        outline[6:14, 6:14] = False
        found = self.edges(levels)
        corners = np.zeros_like(outline)
        corners[np.ix_([5, 14], [5, 14])] = True
        for y, x in np.argwhere(found & ~outline):  # a corner is rounded, inwards
            assert corners[y - 1 : y + 2, x - 1 : x + 2].any()
        assert (found | ~outline | corners).all()
        assert not found[8:12, 8:12].any()

    @pytest.mark.parametrize("shape", ["square", "disc"])
    def test_outlines_are_closed_and_thin(self, shape):
        y, x = np.mgrid[:32, :32] - 15.5
        inside = (np.maximum(abs(y), abs(x)) < 9) if shape == "square" else (np.hypot(y, x) < 10)
        found = self.edges(np.where(inside[..., None], (255, 204, 77), 255).astype(np.uint8))
        free = areas(found)
        assert free[16, 16] != free[0, 0]  # no way from the middle to the outside
        perimeter = 4 * 18 if shape == "square" else 8 * 10
        # A sharp border has two rows of pixels with the same gradient. Rounding errors once made this 92 for 72.
        assert found.sum() <= perimeter

    def test_steps_are_edges_by_their_luminance(self):
        def has_edges(left, right):
            levels = np.zeros((16, 16, 3), dtype=np.uint8)
            levels[:, :8], levels[:, 8:] = left, right
            return self.edges(levels)[1:-1].any(axis=1).tolist() == [True] * 14

        def has_none(left, right):
            levels = np.zeros((16, 16, 3), dtype=np.uint8)
            levels[:, :8], levels[:, 8:] = left, right
            return not self.edges(levels).any()

        # Of equal luminance, by the weights 0.299, 0.587 and 0.114, though far apart in colour.
        assert has_none((255, 0, 0), (0, 130, 0))
        assert has_none((0, 49, 0), (0, 0, 252))
        assert has_edges((0, 0, 0), (0, 130, 0))
        # In 8-bit values of grey; 25.5 is a tenth of the range.
        assert has_edges((100, 100, 100), (135, 135, 135))
        assert has_none((100, 100, 100), (120, 120, 120))

    def test_weak_edges_count_where_they_go_on_from_strong_ones(self):
        levels = np.full((16, 40, 3), 100, dtype=np.uint8)
        levels[8:] = np.linspace(180, 115, 25).clip(min=115).round()[np.minimum(np.arange(40), 24), None]
        found = self.edges(levels)
        assert found[7:9, 1:-1].any(axis=0).all()
        assert not self.edges(levels[:, 24:]).any()  # the weak part by itself

    @pytest.mark.parametrize("value", [0, 1, 93, 255])
    def test_flat_images_have_none(self, value):
        assert not self.edges(np.full((17, 32, 3), value, dtype=np.uint8)).any()

    def test_the_outermost_pixels_are_none(self):
        found = self.edges(random_levels(20, 20))
        assert found[1:-1, 1:-1].any()
        found[1:-1, 1:-1] = False
        assert not found.any()

    def test_without_scikit_image(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "skimage.feature", None)
        with pytest.raises(ImportError, match=r"pip install diffusers-adm\[train\]"):
            make_condition(torch.zeros(3, 8, 8), "edges")
        make_condition(torch.zeros(3, 8, 8), "regions")


class TestColorBlocks:
    @pytest.mark.parametrize("size", [(32, 32), (64, 64), (20, 20), (9, 30), (31, 17), (5, 5), (3, 8)])
    def test_means_by_brute_force(self, size):
        levels = random_levels(*size).astype(int)
        numbers = [min(side, round(8 * side / min(size))) for side in size]
        result = to_levels(make_condition(to_tensor(levels.astype(np.uint8)), "color_blocks"))
        row_of = [y * numbers[0] // size[0] for y in range(size[0])]
        column_of = [x * numbers[1] // size[1] for x in range(size[1])]
        for row in range(numbers[0]):
            for column in range(numbers[1]):
                block = [
                    (y, x) for y in range(size[0]) for x in range(size[1]) if (row_of[y], column_of[x]) == (row, column)
                ]
                total = sum(levels[pixel] for pixel in block)
                mean = (2 * total + len(block)) // (2 * len(block))  # halves up, in whole numbers
                assert block
                assert all((result[pixel] == mean).all() for pixel in block)

    def test_eight_by_eight_equal_blocks_at_any_resolution(self):
        for size in (32, 64, 100):
            result = to_levels(make_condition(to_tensor(random_levels(size, size)), "color_blocks"))
            assert areas_of_colors(result).max() + 1 == 64
            colors = result[0] @ [65536, 256, 1]
            lengths = np.diff(np.flatnonzero(np.diff(colors, prepend=-1, append=-1)))
            assert len(lengths) == 8
            assert set(lengths) == ({size // 8} if size % 8 == 0 else {12, 13})


class TestRegions:
    def test_three_areas_with_specks_and_soft_borders(self):
        """The specks go, the areas stay, and so do their colours."""
        colors = np.array([(255, 255, 255), (220, 40, 30), (30, 60, 200)])
        areas_before = np.zeros((32, 32), dtype=int)
        areas_before[6:26, 4:18], areas_before[10:22, 18:29] = 1, 2
        levels = colors[areas_before]
        levels = levels + np.random.default_rng(0).integers(-4, 5, levels.shape)
        for y, x in ((2, 20), (12, 8), (20, 11), (15, 24), (29, 3)):
            levels[y, x] = (10, 200, 10)
        result = to_levels(make_condition(to_tensor(levels.clip(0, 255).astype(np.uint8)), "regions"))
        distances = np.linalg.norm(result[:, :, None] - colors, axis=3)
        nearest = distances.argmin(axis=2)
        assert distances.min(axis=2).max() < 12
        assert (nearest != areas_before).mean() < 0.02  # corners
        assert areas(nearest).max() + 1 == 3

    def test_two_flat_colours_stay_as_they_are(self):
        levels = np.full((16, 24, 3), (250, 200, 10), dtype=np.uint8)
        levels[:, 11:] = (20, 30, 90)
        assert np.array_equal(to_levels(make_condition(to_tensor(levels), "regions")), levels)

    @pytest.mark.parametrize("size", [(32, 32), (17, 40)])
    def test_at_most_six_colours_in_connected_areas(self, size):
        y, x = np.mgrid[: size[0], : size[1]]
        waves = np.stack([np.sin(x / 5), np.cos(y / 7), np.sin((x + y) / 9)], axis=-1)
        levels = (127.5 * (1 + waves)).astype(np.uint8)
        result = to_levels(make_condition(to_tensor(levels), "regions"))
        colors = {tuple(color) for color in result.reshape(-1, 3)}
        assert 4 <= len(colors) <= 6
        _, sizes = np.unique(areas_of_colors(result), return_counts=True)
        assert len(sizes) <= 20
        assert sizes.min() >= 2

    def test_noise_has_at_most_six_colours(self):
        result = to_levels(make_condition(to_tensor(random_levels(40, 40)), "regions"))
        assert len({tuple(color) for color in result.reshape(-1, 3)}) <= 6


class TestLowResolution:
    @pytest.mark.parametrize("size", [(32, 32), (64, 40), (30, 33), (3, 5)])
    def test_as_pillow_shrinks_and_enlarges(self, size):
        levels = random_levels(*size)
        height, width = (-(-side // 4) * 4 for side in size)
        padded = np.pad(levels, ((0, height - size[0]), (0, width - size[1]), (0, 0)), mode="edge")
        small = Image.fromarray(padded).reduce(4)
        enlarged = np.asarray(small.resize((width, height), Image.Resampling.BILINEAR)).astype(int)
        result = to_levels(make_condition(to_tensor(levels), "low_resolution"))
        assert abs(result - enlarged[: size[0], : size[1]]).max() <= 1  # Pillow rounds twice, once for each side


class TestBadInput:
    @pytest.mark.parametrize(
        "image,message",
        [
            (torch.zeros(1, 3, 8, 8), r"`image` has shape \(1, 3, 8, 8\). Pass one image, \(3, height, width\)"),
            (torch.zeros(8, 8, 3), r"shape \(8, 8, 3\)"),
            (torch.zeros(3, 0, 8), r"shape \(3, 0, 8\)"),
            (torch.zeros(3, 8, 8, dtype=torch.uint8), "is torch.uint8 on cpu.*divided by 255"),
            (torch.zeros(3, 8, 8, dtype=torch.float64), "is torch.float64 on cpu"),
            (torch.zeros(3, 8, 8, device="meta"), "is torch.float32 on meta"),
            (torch.full((3, 8, 8), -0.5), "from -0.5 to -0.5. Pass numbers in"),
            (torch.full((3, 8, 8), 255.0), "from 255 to 255"),
            (torch.full((3, 8, 8), torch.nan), "from nan to nan"),
            (Image.new("RGBA", (8, 8), (0, 0, 0, 9)), "mode RGBA and transparent pixels"),
        ],
        ids=range(10),
    )
    def test_images(self, image, message):
        for kind in KINDS:
            with pytest.raises(ValueError, match=message):
                make_condition(image, kind)

    def test_kinds(self):
        with pytest.raises(ValueError, match="`kind` is 'depth'; it must be one of 'edges', 'color_blocks', 'regions'"):
            make_condition(torch.zeros(3, 8, 8), "depth")


class TestFormats:
    """Images that are not 8-bit RGB."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_grey(self, kind):
        """As the first channel of the same image in colour."""
        levels = random_levels(12, 20)[..., 0]
        colour = torch.from_numpy(levels / np.float32(255)).expand(3, -1, -1)
        for mode, channels in (("L", colour[:1]), ("LA", torch.cat([colour[:1], torch.ones(1, 12, 20)]))):
            condition = make_condition(channels, kind, ImageFormat(mode, len(channels)))
            number = len(channels) if kind == "low_resolution" else 1
            assert condition.shape == (number, 12, 20)
            torch.testing.assert_close(condition[:1], make_condition(colour, kind)[:1], rtol=0, atol=0)
        picture = make_condition(Image.fromarray(levels), kind, ImageFormat("L", 1))
        assert picture.mode == "L"
        assert np.array_equal(np.asarray(picture), to_levels(make_condition(colour, kind))[..., 0])

    @pytest.mark.parametrize("kind", ["edges", "color_blocks", "regions"])
    def test_transparency_is_laid_on_white(self, kind):
        colour = to_tensor(random_levels(8, 16))
        visible = (torch.arange(16) < 8).expand(1, 8, 16).float()
        condition = make_condition(torch.cat([colour, visible]), kind, ImageFormat("RGBA", 4))
        assert torch.equal(condition, make_condition(colour * visible + 1 - visible, kind))

    @pytest.mark.parametrize("kind", ["edges", "color_blocks", "regions"])
    def test_data_have_no_colours(self, kind):
        image_format = ImageFormat("array", 5, (0, 10000), 10001)
        with pytest.raises(ValueError, match=f"'{kind}' are made from grey or RGB .* 5-channel .*'low_resolution'"):
            make_condition(torch.zeros(5, 8, 8), kind, image_format)
        with pytest.raises(ValueError, match="are made from grey or RGB images"):
            condition_format_of(kind, image_format)

    @pytest.mark.parametrize("num_levels", [4096, None])
    def test_low_resolution_of_any_data(self, num_levels):
        """Means of 4 x 4 pixels, between the values of the data, and bilinear between their centres."""
        image_format = ImageFormat("array", 5, (0, 4095), num_levels)
        values = np.random.default_rng(0).integers(0, 4096, (5, 8, 16))
        image = torch.from_numpy(values).float() / 4095
        means = values.reshape(5, 2, 4, 4, 4).mean(axis=(2, 4))
        if num_levels:
            means = np.floor(means + 0.5)
        large = torch.nn.functional.interpolate(torch.from_numpy(means)[None], scale_factor=4, mode="bilinear")[0]
        expected = (large + 0.5).floor() if num_levels else large
        result = make_condition(image, "low_resolution", image_format)
        assert condition_format_of("low_resolution", image_format) == image_format
        torch.testing.assert_close(4095 * result.double(), expected, rtol=0, atol=2e-3)


class TestDownsampling:
    @pytest.mark.parametrize("num_levels", [2, 256, 4096, 65536, None])
    @pytest.mark.parametrize("factor", [1, 2, 32])
    def test_means_by_brute_force(self, num_levels, factor):
        levels = np.random.default_rng(0).integers(0, num_levels or 1000, (1, 2, 32, 64))
        half = ((num_levels or 1000) - 1) / 2
        means = levels.reshape(1, 2, 32 // factor, factor, 64 // factor, factor).mean(axis=(3, 5))
        if num_levels is not None:
            means = np.floor(means + 0.5)
        images = torch.from_numpy(levels / half - 1).float()
        result = (downsample(images, factor, num_levels).double() + 1) * half
        assert downsample(images, factor, num_levels).dtype == torch.float32
        torch.testing.assert_close(result, torch.from_numpy(means), rtol=0, atol=1e-6 * half)
