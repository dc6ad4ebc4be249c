"""Grids of images: the place of every image, and unchanged pixels."""

import numpy as np
import pytest
from PIL import Image

from diffusers_adm.training.images import labelled_grid, labelled_strips


def solid(value, size=(8, 6)):
    return Image.new("RGB", size, (value, 0, 0))


def test_placement_without_labels():
    images = [solid(10 * index) for index in range(6)]
    pixels = np.asarray(labelled_grid(images, rows=2, cols=3, padding=2))
    assert pixels.shape == (2 + 2 * (6 + 2), 2 + 3 * (8 + 2), 3)
    for index in range(6):
        row, col = divmod(index, 3)
        top, left = 2 + row * 8, 2 + col * 10
        assert np.all(pixels[top : top + 6, left : left + 8] == (10 * index, 0, 0))
    assert np.all(pixels[:2] == 255)
    assert np.all(pixels[:, 10:12] == 255)


def test_scaling_repeats_pixels_and_labels_leave_them_alone():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    grid = labelled_grid([image] * 2, 1, 2, ["a row"], ["one", "a label of many words, all of them long"], scale=4)
    pixels = np.asarray(grid)
    expected = np.asarray(image).repeat(4, axis=0).repeat(4, axis=1)
    top, left = pixels.shape[0] - 2 - 128, pixels.shape[1] - 2 - 128
    assert np.array_equal(pixels[top : top + 128, left : left + 128], expected)
    assert np.array_equal(pixels[top : top + 128, left - 130 : left - 2], expected)
    # There is ink to the left of the first row and above either column, and none between.
    assert np.any(pixels[top : top + 128, : left - 132] < 100)
    assert np.any(pixels[:top, left - 130 : left - 2] < 100)
    assert np.any(pixels[:top, left : left + 128] < 100)
    assert np.all(pixels[:top, left - 2 : left] == 255)
    assert np.all(pixels[:top, : left - 132] == 255)


def test_missing_pictures_stay_blank_and_grey_is_accepted():
    pixels = np.asarray(labelled_grid([Image.new("L", (4, 4), 7)], rows=1, cols=2, padding=0))
    assert np.all(pixels[:, :4] == 7)
    assert np.all(pixels[:, 4:] == 255)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"images": []}, "Got 0 images for a grid of 1 x 2"),
        ({"images": [solid(0)] * 3}, "Got 3 images for a grid of 1 x 2. Pass between 1 and 2"),
        ({"images": [solid(0), solid(0, (4, 4))]}, "must have one size"),
        ({"row_labels": ["a", "b"]}, "`row_labels` holds 2 labels but the grid has 1"),
        ({"col_labels": ["a"]}, "`col_labels` holds 1 labels but the grid has 2"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        labelled_grid(**{"images": [solid(0)], "rows": 1, "cols": 2, **arguments})


def test_strips():
    """Five strips of two images: two in a row, the sixth place blank."""
    columns = {"one": [solid(10 * index) for index in range(5)], "two": [solid(100 + index) for index in range(5)]}
    assert (
        labelled_strips(columns).tobytes()
        == labelled_grid(
            [solid(value) for value in (0, 100, 10, 101, 20, 102, 30, 103, 40, 104)], 3, 4, None, ["one", "two"] * 2
        ).tobytes()
    )
    assert (
        labelled_strips({"one": columns["one"][:1]}, scale=2).tobytes()
        == labelled_grid([solid(0)], 1, 1, None, ["one"], scale=2).tobytes()
    )
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        labelled_strips({"one": columns["one"], "two": columns["two"][:4]})
