"""What pipelines take as images and masks, in each form, and what they refuse."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_adm.conditioning.image_format import ImageFormat
from diffusers_adm.conditioning.image_inputs import read_control_images, read_images, read_masks, read_values
from diffusers_adm.conditioning.source_image import SourceImageCondition


PIXELS = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), dtype=np.uint8)  # height 5, width 4
EXPECTED = torch.from_numpy(PIXELS / 255).permute(0, 3, 1, 2).float()
GREY = PIXELS[..., 0]


class TestImages:
    @pytest.mark.parametrize(
        "images",
        [
            [Image.fromarray(pixels) for pixels in PIXELS],
            tuple(Image.fromarray(pixels) for pixels in PIXELS),
            PIXELS,
            list(PIXELS),
            (PIXELS / 255).astype(np.float32),
            PIXELS / 255,
            torch.from_numpy(PIXELS).permute(0, 3, 1, 2),
            EXPECTED,
            list(EXPECTED),
            EXPECTED.double(),
            [EXPECTED[:1], EXPECTED[1:]],
            [Image.fromarray(PIXELS[0]), EXPECTED[1]],
        ],
    )
    def test_forms(self, images):
        actual = read_images(images, "image", ImageFormat.of_channels(3))
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, EXPECTED, rtol=0, atol=1e-7)

    def test_one(self):
        for image in (Image.fromarray(PIXELS[0]), PIXELS[0], EXPECTED[0]):
            assert read_images(image, "image", ImageFormat.of_channels(3)).shape == (1, 3, 5, 4)

    @pytest.mark.parametrize(
        "images", [[Image.fromarray(grey) for grey in GREY], GREY, GREY[..., None], torch.from_numpy(GREY)[:, None]]
    )
    def test_one_channel(self, images):
        assert torch.equal(
            read_images(images, "image", ImageFormat.of_channels(1)), torch.from_numpy(GREY)[:, None].float() / 255
        )
        assert read_images(images[0], "image", ImageFormat.of_channels(1)).shape == (1, 1, 5, 4)

    def test_values_come_back(self):
        """Of floating point numbers every bit, of 8-bit images every value."""
        images = torch.rand(1, 3, 5, 4)
        assert torch.equal(read_images(images, "image", ImageFormat.of_channels(3)), images)
        every = np.arange(256, dtype=np.uint8).reshape(16, 16)
        read = read_images(Image.fromarray(every), "image", ImageFormat.of_channels(1))
        assert (np.round(255 * read[0, 0].numpy()) == every).all()

    def test_modes_that_lose_nothing(self):
        colours = Image.fromarray(PIXELS[0])
        for image in (Image.fromarray(GREY[0]), colours.quantize(4), colours.convert("1")):
            expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255
            assert torch.equal(read_images(image, "image", ImageFormat.of_channels(3))[0], expected)

    def test_the_argument_is_not_changed(self):
        images = PIXELS.copy()
        read_images(images, "image", ImageFormat.of_channels(3)).zero_()
        assert (images == PIXELS).all()
        given = EXPECTED.clone()
        (read_images(given, "image", ImageFormat.of_channels(3)) * 2).zero_()
        assert torch.equal(given, EXPECTED)

    @pytest.mark.parametrize(
        "images, channels, message",
        [
            ([], 3, "`image` is empty"),
            ("cat.png", 3, "`image` is a str; pass a Pillow image, an array, a tensor, or a list"),
            (None, 3, "`image` is a NoneType"),
            (Image.new("RGBA", (4, 5)), 3, "`image` has mode RGBA and transparent pixels"),
            (Image.new("LA", (4, 5)), 1, "`image` has mode LA and transparent pixels"),
            (Image.new("RGB", (4, 5)), 1, "`image` has mode RGB, but this model's images have 1 channels"),
            (Image.new("F", (4, 5)), 3, "`image` has mode F, whose range of values is not known"),
            (Image.new("I;16", (4, 5)), 3, "`image` has mode I;16, whose range of values is not known"),
            (Image.new("RGB", (4, 5)), 4, "`image` is a Pillow image, but this model's images have 4 channels"),
            (PIXELS.transpose(0, 3, 1, 2), 3, "`image` has shape (2, 3, 5, 4); pass (height, width, channels)"),
            (EXPECTED.permute(0, 2, 3, 1), 3, "`image` has shape (2, 5, 4, 3); pass (channels, height, width)"),
            (EXPECTED[0, 0], 3, "`image` has shape (5, 4)"),
            (EXPECTED[None], 3, "`image` has shape (1, 2, 3, 5, 4)"),
            (EXPECTED[:0], 3, "`image` has shape (0, 3, 5, 4)"),
            (PIXELS.astype(np.int64), 3, "`image` is of type torch.int64; pass `uint8`, or floating point"),
            (2 * EXPECTED - 1, 3, "they must lie in [0, 1]"),
            (255 * EXPECTED, 3, "they must lie in [0, 1]"),
            (EXPECTED.clone().index_fill_(0, torch.tensor([0]), float("nan")), 3, "`image` has values from nan to nan"),
            (
                [Image.new("RGB", (4, 5)), Image.new("RGB", (5, 4))],
                3,
                "several sizes (height, width): [(4, 5), (5, 4)]",
            ),
        ],
    )
    def test_refused(self, images, channels, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            read_images(images, "image", ImageFormat.of_channels(channels))


class TestMasks:
    WHITE = np.array([[True, False, False, True]] * 5)

    @pytest.mark.parametrize(
        "mask",
        [
            Image.fromarray(WHITE),
            Image.fromarray(WHITE).convert("L"),
            Image.fromarray(WHITE).convert("RGB"),
            Image.fromarray(WHITE).convert("P"),
            WHITE,
            WHITE.astype(np.uint8) * 255,
            WHITE.astype(np.float64)[..., None],
            torch.from_numpy(WHITE),
            torch.from_numpy(WHITE)[None].float(),
        ],
    )
    def test_forms(self, mask):
        read = read_masks(mask, "mask_image")
        assert read.dtype == torch.bool
        assert torch.equal(read, torch.from_numpy(self.WHITE)[None, None])
        assert torch.equal(read_masks([mask, mask], "mask_image"), read.expand(2, 1, 5, 4))

    def test_grey(self):
        assert read_masks(np.array([[0.0, 0.49, 0.5, 1.0]]), "mask_image").flatten().tolist() == [
            False,
            False,
            True,
            True,
        ]
        assert read_masks(np.array([[127, 128]], dtype=np.uint8), "mask_image").flatten().tolist() == [False, True]

    @pytest.mark.parametrize(
        "mask, message",
        [
            (Image.new("RGBA", (4, 5)), "`mask_image` has mode RGBA and transparent pixels"),
            (torch.zeros(2, 3, 5, 4), "`mask_image` has shape (2, 3, 5, 4)"),
            (np.full((5, 4), 255.0), "they must lie in [0, 1]"),
            (np.ones((5, 4), dtype=np.int64), "`mask_image` is of type torch.int64"),
            (np.eye(4, dtype=np.uint8), "`mask_image` holds 8-bit numbers up to 1"),
            (torch.eye(4, dtype=torch.uint8), "`mask_image` holds 8-bit numbers up to 1"),
            (Image.new("L", (4, 5), 1), "`mask_image` holds 8-bit numbers up to 1"),
        ],
    )
    def test_refused(self, mask, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            read_masks(mask, "mask_image")


class TestConditions:
    """As images, and what edge detectors return."""

    EDGES = np.random.default_rng(0).random((4, 5)) < 0.5

    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize(
        "form",
        [
            lambda edges: edges,
            lambda edges: edges.astype(np.float32),
            lambda edges: edges.astype(np.uint8) * 255,
            lambda edges: torch.from_numpy(edges),
            lambda edges: torch.from_numpy(edges).float(),
            lambda edges: Image.fromarray(edges),
            lambda edges: Image.fromarray(edges).convert("L"),
            lambda edges: Image.fromarray(edges).convert("RGB").convert("L"),
            lambda edges: Image.fromarray(edges).convert("RGBA").convert("LA"),
        ],
        ids=["bool", "float", "uint8", "tensor", "float-tensor", "1", "L", "RGB-L", "LA-opaque"],
    )
    def test_every_form_of_edges(self, form, channels):
        found = read_control_images(form(self.EDGES), "image", ImageFormat.of_channels(channels))
        expected = torch.from_numpy(self.EDGES).float().expand(1, channels, 4, 5)
        assert torch.equal(found, expected)

    @pytest.mark.parametrize(
        "condition",
        [
            EDGES.astype(np.uint8),
            np.stack([EDGES.astype(np.uint8)] * 3, axis=-1),
            torch.from_numpy(EDGES.astype(np.uint8)),
            Image.fromarray(EDGES.astype(np.uint8)),
            Image.fromarray(EDGES.astype(np.uint8)).convert("RGB"),
        ],
        ids=["array", "colour-array", "tensor", "L", "RGB"],
    )
    def test_8_bit_ones_are_next_to_black(self, condition):
        """The type tells the range; but it is said, since most who pass them mean white."""
        with pytest.warns(UserWarning, match="`image` holds no 8-bit value above 1"):
            found = read_control_images([condition], "image", ImageFormat.of_channels(3))
        expected = torch.from_numpy(self.EDGES).float().expand(1, 3, 4, 5) / 255
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)  # one rounding of a division

    def test_black_is_one(self):
        assert not read_control_images(Image.new("RGB", (5, 4)), "image", ImageFormat.of_channels(3)).any()

    def test_opaque_pictures_need_no_background(self):
        picture = Image.fromarray(np.random.default_rng(1).integers(256, size=(4, 5, 3), dtype=np.uint8))
        for read in (read_images, read_control_images):
            assert torch.equal(
                read(picture.convert("RGBA"), "image", ImageFormat.of_channels(3)),
                read_images(picture, "image", ImageFormat.of_channels(3)),
            )

    def test_drawings_on_a_transparent_layer_belong_on_black(self):
        with pytest.raises(ValueError, match="image.size, 'black'"):
            read_control_images(Image.new("RGBA", (5, 4)), "image", ImageFormat.of_channels(3))

    def test_arrays_that_cannot_be_written_to(self, recwarn):
        array = np.asarray(Image.new("RGB", (5, 4)))
        assert not array.flags.writeable
        read_images(array, "image", ImageFormat.of_channels(3))
        assert not recwarn.list


class TestFractionsInPlaceOfValues:
    """Of a model whose images are values of the data."""

    BANDS = ImageFormat("array", 5, (0, 5000), 5001)
    FRACTIONS = np.random.default_rng(0).random((2, 4, 3, 5), dtype=np.float32)

    @pytest.mark.parametrize(
        "images",
        [FRACTIONS, list(FRACTIONS), torch.from_numpy(FRACTIONS).movedim(-1, 1), FRACTIONS.astype(np.float16)],
    )
    def test_are_taken_literally_with_a_warning(self, images):
        with pytest.warns(
            UserWarning, match=r"`image` lie in \[0, 1\], but .* from 0 to 5000.*with `x \* 5000`"
        ) as caught:
            found = read_images(images, "image", self.BANDS)
        assert len(caught) == 1
        expected = torch.from_numpy(self.FRACTIONS).movedim(-1, 1) / 5000
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=0)

    def test_a_range_that_does_not_begin_at_0(self):
        with pytest.warns(UserWarning, match=r"with `-1024 \+ x \* 4095`"):
            read_images(self.FRACTIONS[..., :1], "image", ImageFormat("L", 1, (-1024, 3071), 4096))

    @pytest.mark.parametrize(
        "images, image_format",
        [
            (FRACTIONS * 5000, BANDS),
            ((FRACTIONS > 0.5).astype(np.uint16), BANDS),
            (0 * FRACTIONS, BANDS),
            ([FRACTIONS[0], 2 * FRACTIONS[1]], BANDS),
            (FRACTIONS, ImageFormat("array", 5, (0, 20), None)),
            (FRACTIONS, ImageFormat("array", 5, (0, 1), None)),
            (FRACTIONS[..., :1], ImageFormat("L", 1, (0, 4095), 4096)),
        ],
    )
    def test_others_are_not_warned_of(self, images, image_format, recwarn):
        read_images(images, "image", image_format)
        assert not recwarn.list


class TestMasksOfThreeChannels:
    """As drawing programs save them: three equal channels are one mask."""

    MASK = GREY[:1] > 127  # (1, height, width)

    @pytest.mark.parametrize(
        "mask",
        [
            torch.from_numpy(MASK).expand(3, -1, -1),
            torch.from_numpy(MASK).float().expand(3, -1, -1),
            np.stack([MASK[0]] * 3, axis=-1),
        ],
        ids=lambda mask: f"{type(mask).__name__}-{tuple(mask.shape)}",
    )
    def test_equal_channels_are_one_mask(self, mask):
        assert torch.equal(read_masks(mask, "mask_image"), torch.from_numpy(self.MASK)[None])

    def test_three_masks_stay_three(self):
        masks = torch.from_numpy(np.concatenate([GREY, GREY[:1, ::-1]]) > 127)  # (3, height, width)
        assert torch.equal(read_masks(masks, "mask_image"), masks[:, None])

    def test_colours_are_refused(self):
        with pytest.raises(ValueError, match="`mask_image` has three different channels"):
            read_masks(PIXELS[0], "mask_image")


BANDS = ImageFormat("array", 2, (-300, 900), None)
REFUSED = "is of type torch.uint8, of 8 bits, but .* have values from -300 to 900 .* Pass such values as `float32`"


class TestMessagesNameTheEntry:
    """Of the config that holds the format of the images."""

    def test_of_source_images(self):
        condition = SourceImageCondition(BANDS)
        condition.read(np.zeros((4, 4, 2), np.int16))
        with pytest.raises(ValueError, match="the value range of this model's source images .`source_format`."):
            condition.read(np.full((4, 4, 2), 901, np.int16))
        with pytest.raises(ValueError, match=REFUSED):
            condition.read(np.zeros((4, 4, 2), np.uint8))

    def test_of_conditioning_images(self):
        with pytest.raises(ValueError, match="the value range of this ControlNet's images .`condition_format`."):
            read_control_images(np.full((4, 4, 2), -301.0), "image", BANDS)
        with pytest.raises(ValueError, match=REFUSED):
            read_control_images(torch.zeros(2, 4, 4, dtype=torch.uint8), "image", BANDS)

    def test_8_bits_of_a_narrower_range(self):
        few = ImageFormat("array", 2, (0, 200), 201)
        values = read_values(np.full((4, 4, 2), 200, np.uint8), "image", few)
        assert (values == 200).all()
