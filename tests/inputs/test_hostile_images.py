"""Damaged, hostile and unusual image files: through the data path of training, and as arguments of pipelines."""

import logging
import resource

import image_files
import numpy as np
import PIL.Image
import pytest
from image_files import SIDE

from diffusers_adm.conditioning.image_format import ImageFormat
from diffusers_adm.conditioning.image_inputs import read_control_images, read_images, read_masks
from diffusers_adm.data.checks import check_images
from diffusers_adm.data.decoding import decode_image
from diffusers_adm.data.images import ImageDataset
from diffusers_adm.data.pixels import UnusableImageError


# What the data path does with each file: the colours of the top and the bottom, or the reason to leave it out.
RED, BLUE, WHITE, DEEP = (255, 0, 0), (0, 0, 255), (255, 255, 255), (156, 156, 156)  # 40000 / 257 = 155.6
UNREADABLE, TOO_LARGE, UNSUPPORTED = "unreadable", "too large (decompression bomb)", "unsupported"
OF_DATA = {
    "whole.png": (RED, BLUE),
    "truncated.png": UNREADABLE,
    "truncated.jpg": UNREADABLE,
    "empty.png": UNREADABLE,
    "one_pixel.png": (RED, RED),
    "huge.png": TOO_LARGE,
    "cmyk.jpg": (RED, BLUE),
    "palette.png": (RED, BLUE),
    "see_through_palette.png": (WHITE, BLUE),
    "see_through.png": (WHITE, BLUE),
    "animated.gif": (RED, BLUE),
    "animated.png": (RED, BLUE),
    "animated.webp": (RED, BLUE),
    "rotated.jpg": (RED, BLUE),
    "text.png": UNREADABLE,
    "page.png": UNREADABLE,
    "deep.png": (DEEP, DEEP),
    "drawing.svg": UNREADABLE,
    "drawing.png": UNREADABLE,
    "program.png": UNSUPPORTED,
    "folder.png": UNREADABLE,
    "objects.npy": UNREADABLE,  # 8-bit RGB data are read by Pillow alone
    "huge.npy": UNREADABLE,
    "pickle.npy": UNREADABLE,
}
# The same for the `image` of a pipeline of 8-bit RGB images: what its user opened with Pillow. Words of the refusal,
# or the name of the error with which Pillow refuses to open it.
OF_PIPELINES = {
    **OF_DATA,
    "truncated.png": "cannot be decoded",
    "truncated.jpg": "cannot be decoded",
    "empty.png": "UnidentifiedImageError",
    "huge.png": "DecompressionBombError",
    "cmyk.jpg": r"image.convert\('RGB'\)",
    "see_through_palette.png": "transparent pixels",
    "see_through.png": "transparent pixels",
    "text.png": "UnidentifiedImageError",
    "page.png": "UnidentifiedImageError",
    "deep.png": "range of values is not known",
    "drawing.svg": "UnidentifiedImageError",
    "drawing.png": "UnidentifiedImageError",
    "program.png": "never run",
    "folder.png": "IsADirectoryError",
    "objects.npy": "UnidentifiedImageError",
    "huge.npy": "UnidentifiedImageError",
    "pickle.npy": "UnidentifiedImageError",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return image_files.write(tmp_path_factory.mktemp("images"))


def ends_of(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return pixels[0, 0].astype(int), pixels[-1, -1].astype(int)


def assert_colours(pixels: np.ndarray, expected: tuple) -> None:
    for found, wanted in zip(ends_of(pixels), expected, strict=True):
        assert np.abs(found - wanted).max() <= 12, (found, wanted)  # JPEG at quality 95


def test_every_file_has_its_entries(files):
    assert set(files) == set(OF_DATA) == set(OF_PIPELINES)


@pytest.mark.parametrize("name", OF_DATA)
@pytest.mark.parametrize("as_bytes", [True, False], ids=["bytes", "path"])
def test_data(files, name, as_bytes):
    if as_bytes and not files[name].is_file():
        pytest.skip("a folder has no bytes")
    content = files[name].read_bytes() if as_bytes else None
    stored = {"bytes": content, "path": str(files[name])}
    expected = OF_DATA[name]
    if isinstance(expected, tuple):
        assert_colours(np.asarray(decode_image(stored, None)), expected)
        return
    with pytest.raises(UnusableImageError, match=r"\w+ \w+|\w+: ") as caught:
        decode_image(stored, None)
    assert caught.value.reason == expected


@pytest.mark.parametrize(
    ("name", "reason", "words"),
    [
        ("objects.npy", UNSUPPORTED, "never unpickled"),
        ("pickle.npy", UNSUPPORTED, "never unpickled"),
        ("huge.npy", TOO_LARGE, "bytes"),
        ("program.png", UNSUPPORTED, "never run"),
    ],
)
def test_data_of_any_format(files, name, reason, words):
    with pytest.raises(UnusableImageError, match=words) as caught:
        decode_image({"bytes": None, "path": str(files[name])}, ImageFormat("array", 3))
    assert caught.value.reason == reason


@pytest.mark.parametrize("name", OF_PIPELINES)
def test_pipelines(files, name):
    expected = OF_PIPELINES[name]
    for read in (read_images, read_control_images):
        if isinstance(expected, tuple):
            with PIL.Image.open(files[name]) as image:
                values = read(image, "image", ImageFormat())
            assert_colours(255 * values[0].permute(1, 2, 0).numpy(), expected)
            continue
        if expected.endswith("Error"):  # Pillow's own refusal, before a pipeline has seen the image
            with pytest.raises((OSError, PIL.Image.DecompressionBombError)) as caught:  # noqa: PT011
                PIL.Image.open(files[name])
            assert type(caught.value).__name__ == expected
            continue
        with pytest.raises(ValueError, match=expected), PIL.Image.open(files[name]) as image:
            read(image, "image", ImageFormat())


def test_masks(files):
    """A mask is turned upright like its image; damaged ones are refused."""
    for name in ("truncated.png", "truncated.jpg", "program.png"):
        with pytest.raises(ValueError, match="`mask_image`"), PIL.Image.open(files[name]) as image:
            read_masks(image, "mask_image")
    mask = PIL.Image.new("L", (SIDE, SIDE))
    mask.paste(255, (0, 0, SIDE, SIDE // 2))
    mask = mask.transpose(PIL.Image.Transpose.ROTATE_90)
    mask.getexif()[274] = 6
    read = read_masks(mask, "mask_image")[0, 0]
    assert read[: SIDE // 2].all()
    assert not read[SIDE // 2 :].any()


def test_a_dataset_with_all_of_them(files, tmp_path, caplog):
    """The images that can be used are used; the others are counted and named, and none ends the run."""
    datasets = pytest.importorskip("datasets")
    rows = [{"image": {"bytes": None, "path": str(path)}} for path in files.values()]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    dataset = datasets.Dataset.from_list(rows, features=features)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with caplog.at_level(logging.WARNING):
        usable, skipped = check_images(dataset, SIDE, min_image_size=2, output_dir=tmp_path)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 500_000  # KiB: none of the bombs was decoded
    wanted = [name for name, result in OF_DATA.items() if isinstance(result, tuple) and name != "one_pixel.png"]
    assert len(usable) == len(wanted)
    assert sum(map(len, skipped.values())) == len(files) - len(wanted)
    report = (tmp_path / "skipped_images.txt").read_text(encoding="utf-8")
    assert all(f"{path}\t" in report for name, path in files.items() if name not in wanted)
    images = ImageDataset(usable, SIDE, center_crop=True)
    assert all(bool(images[index]["images"].isfinite().all()) for index in range(len(images)))


@pytest.mark.faults
def test_a_real_bomb(tmp_path):
    """900 million pixels that could be decoded, in 2.7 GB."""
    path = tmp_path / "bomb.png"
    path.write_bytes(image_files.bomb())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UnusableImageError, match="limit"):
        decode_image({"bytes": None, "path": str(path)}, None)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
