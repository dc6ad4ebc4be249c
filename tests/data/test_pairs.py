"""Pairs of images: joined by a column or by their file names, and made from one image."""

import io
import logging

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from diffusers_adm.conditioning.control_images import make_condition
from diffusers_adm.conditioning.image_format import ImageFormat
from diffusers_adm.conditioning.made_sources import NOISE_STDS, add_noise, grayscale, make_source, source_format_of
from diffusers_adm.data.pairs import MadeSourceDataset, pair_images
from diffusers_adm.training import ImageDataset, load_image_dataset


def plain(value, size=(8, 8)):
    """An image of one colour, which tells it apart."""
    return Image.new("RGB", size, (value, value, value))


def encoded(image, path=None):
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": path}


def write(path, values, paths=None, **columns):
    paths = paths or [None] * len(values)
    images = [encoded(plain(value), name) for value, name in zip(values, paths, strict=True)]
    pyarrow.parquet.write_table(pyarrow.table({"image": images, **columns}), path)
    return {"data_files": [str(path)]}


def joined(target, source, columns=None):
    """`(target, source)` of each pair, by the value of their pixels."""
    pairs = pair_images(load_image_dataset(**target)[0], target, source, columns)
    return [
        tuple(Image.open(io.BytesIO(read(row[name]))).getpixel((0, 0))[0] for name in ("image", "conditioning_image"))
        for row in pairs
    ]


def read(image):
    if image["bytes"] is not None:
        return image["bytes"]
    with open(image["path"], "rb") as file:
        return file.read()


class TestColumns:
    def test_of_one(self, tmp_path):
        target = write(tmp_path / "a.parquet", [1, 2, 3], key=["x", "y", "z"])
        source = write(tmp_path / "b.parquet", [13, 11, 12], key=["z", "x", "y"])
        assert joined(target, source, ["key"]) == [(1, 11), (2, 12), (3, 13)]

    def test_of_two(self, tmp_path):
        target = write(tmp_path / "a.parquet", [1, 2], name=["x", "x"], part=[1, 2])
        source = write(tmp_path / "b.parquet", [12, 11], name=["x", "x"], part=[2, 1])
        assert joined(target, source, ["name", "part"]) == [(1, 11), (2, 12)]

    def test_several_targets_may_have_one_source(self, tmp_path):
        target = write(tmp_path / "a.parquet", [1, 2, 3], key=["x", "x", "y"])
        source = write(tmp_path / "b.parquet", [11, 12], key=["x", "y"])
        assert joined(target, source, ["key"]) == [(1, 11), (2, 11), (3, 12)]

    def test_of_a_random_subset(self, tmp_path):
        keys = [f"k{number}" for number in range(20)]
        target = write(tmp_path / "a.parquet", range(20), key=keys) | {"max_train_samples": 7}
        source = write(tmp_path / "b.parquet", range(119, 99, -1), key=keys[::-1])
        pairs = joined(target, source, ["key"])
        assert len(pairs) == 7
        assert all(there == here + 100 for here, there in pairs)

    def test_labels_and_rows_stay(self, tmp_path):
        target = write(tmp_path / "a.parquet", [1, 2, 3], key=["x", "y", "z"], kind=["u", "v", "u"])
        source = write(tmp_path / "b.parquet", [13, 11], key=["z", "x"])
        images, _ = load_image_dataset(**target, label_column="kind")
        pairs = pair_images(images, target, source, ["key"])
        assert pairs["row"][:] == [0, 2]
        assert pairs["label"][:] == [0, 0]

    def test_images_without_a_partner_are_counted_and_left_out(self, tmp_path, caplog):
        target = write(tmp_path / "a.parquet", [1, 2, 3, 4, 5], key=["a", "b", "c", "d", "e"])
        source = write(tmp_path / "b.parquet", [11, 16], key=["a", "f"])
        with caplog.at_level(logging.WARNING):
            assert joined(target, source, ["key"]) == [(1, 11)]
        assert "4 of 5 target images" in caplog.text
        assert "'b', 'c', 'd' and 1 more" in caplog.text
        assert "1 of 2 source images" in caplog.text
        assert "'f'" in caplog.text

    def test_none_with_a_partner(self, tmp_path):
        target = write(tmp_path / "a.parquet", [1, 2], key=["a", "b"])
        source = write(tmp_path / "b.parquet", [1, 2], key=["c", "d"])
        with pytest.raises(ValueError, match="None of the 2 target images has a source.*'a', 'b'.*'c', 'd'"):
            joined(target, source, ["key"])

    def test_repeated_sources(self, tmp_path):
        target = write(tmp_path / "a.parquet", [1, 2], key=["a", "b"])
        source = write(tmp_path / "b.parquet", [1, 2, 3, 4, 5], key=["a", "a", "b", "a", "b"])
        with pytest.raises(ValueError, match="`pair_column` key of .*b.parquet are not unique.*have 'a', 'b'. Name"):
            joined(target, source, ["key"])

    def test_missing_keys(self, tmp_path):
        target = write(tmp_path / "a.parquet", [1, 2, 3], key=["a", None, None])
        source = write(tmp_path / "b.parquet", [1], key=["a"])
        with pytest.raises(ValueError, match="2 rows of .*a.parquet have no value in `pair_column` key.*row 1"):
            joined(target, source, ["key"])

    def test_missing_columns(self, tmp_path):
        target = write(tmp_path / "a.parquet", [1], key=["a"])
        source = write(tmp_path / "b.parquet", [1], other=["a"])
        with pytest.raises(ValueError, match="`pair_column` is 'key', but .*b.parquet has the columns image, other"):
            joined(target, source, ["key"])


class TestFileNames:
    def save(self, folder, **values):
        for name, value in values.items():
            stem, extension = name.rsplit("_", 1)
            path = folder / f"{stem.replace('__', '/')}.{extension}"
            path.parent.mkdir(parents=True, exist_ok=True)
            plain(value).save(path)
        return {"train_data_dir": str(folder)}

    def test_of_folders(self, tmp_path, caplog):
        """By the path below the folder, without the extension."""
        target = self.save(tmp_path / "a", cats__1_png=1, dogs__1_png=2, dogs__2_png=3)
        source = self.save(tmp_path / "b", dogs__1_bmp=12, cats__1_bmp=11, dogs__3_bmp=14)
        with caplog.at_level(logging.WARNING):
            assert joined(target, source) == [(1, 11), (2, 12)]
        assert "'dogs/2'" in caplog.text
        assert "'dogs/3'" in caplog.text

    def test_of_folders_named_like_splits(self, tmp_path):
        target = self.save(tmp_path / "a", train__1_png=1, test__1_png=2)
        source = self.save(tmp_path / "b", train__1_png=11, test__1_png=12)
        assert joined(target, source) == [(1, 11)]

    def test_that_differ_by_extension_only(self, tmp_path):
        target = self.save(tmp_path / "a", one_png=1)
        source = self.save(tmp_path / "b", one_png=1, one_bmp=2)
        with pytest.raises(ValueError, match="The file names of .*b are not unique: several source images have 'one'"):
            joined(target, source)

    def test_stored_in_parquet(self, tmp_path):
        target = write(tmp_path / "a.parquet", [1, 2], ["one.png", "two.png"])
        source = write(tmp_path / "b.parquet", [12, 11], ["two.webp", "one.webp"])
        assert joined(target, source) == [(1, 11), (2, 12)]

    def test_that_are_missing(self, tmp_path):
        target = write(tmp_path / "a.parquet", [1, 2], ["one.png", None])
        with pytest.raises(ValueError, match="1 of 2 images of .*a.parquet have no file name.*Pass `pair_column`"):
            joined(target, write(tmp_path / "b.parquet", [1], ["one.png"]))


def photo(seed=0, size=(8, 8), channels=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (channels, *size), generator=generator).float() / 255


class TestMadeSources:
    def test_grey_values_are_those_of_pillow(self):
        image = photo(size=(64, 48))
        picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
        expected = torch.from_numpy(np.array(picture.convert("L")))[None]
        assert torch.equal((grayscale(image) * 255).round().byte(), expected)
        grey = torch.arange(256).view(1, 16, 16) / 255
        assert torch.equal(grayscale(grey.expand(3, -1, -1)), grey)

    def test_noise_has_a_standard_deviation_in_its_range(self):
        image = torch.full((5, 64, 64), 0.5)
        stds = [(add_noise(image, torch.Generator().manual_seed(seed)) - image).std().item() for seed in range(40)]
        # Clipping at one standard deviation, for the strongest, takes a third of it.
        assert NOISE_STDS[0] * 0.95 < min(stds) < 0.1
        assert 0.3 < max(stds) < NOISE_STDS[1]
        first, second = (add_noise(image, torch.Generator().manual_seed(3)) for _ in range(2))
        assert torch.equal(first, second)
        assert 0 <= first.min() <= first.max() <= 1

    @pytest.mark.parametrize("kind", ["edges", "color_blocks", "regions", "low_resolution"])
    def test_kinds_of_control_images(self, kind):
        image = photo(size=(16, 32))
        assert torch.equal(make_source(image, kind), make_condition(image, kind))
        assert source_format_of(kind, ImageFormat()) == ImageFormat()

    def test_bad_input(self):
        with pytest.raises(ValueError, match="`source` is 'depth'; it must be one of 'grayscale', 'noise', 'edges'"):
            make_source(photo(), "depth")
        five = ImageFormat("array", 5, (0, 1), None)
        with pytest.raises(ValueError, match="`source` grayscale is made from RGB images, but these are 5-channel"):
            make_source(photo(channels=5), "grayscale", five)
        assert make_source(photo(channels=5), "noise", five, torch.Generator()).shape == (5, 8, 8)

    def test_the_format_is_that_of_the_images(self):
        deep = ImageFormat("RGB", 3, (0, 4095), 4096)
        assert source_format_of("grayscale", deep) == ImageFormat("L", 1, (0, 4095), 4096)
        assert source_format_of("noise", deep) == deep
        image = torch.randint(0, 4096, (3, 8, 8), generator=torch.Generator().manual_seed(0)) / 4095
        grey = make_source(image, "grayscale", deep)
        assert (
            grey - torch.einsum("c,chw->hw", torch.tensor([0.299, 0.587, 0.114]), image)
        ).abs().max() < 0.6 / 4095  # half a level, and rounded weights
        levels = make_source(image, "noise", deep, torch.Generator().manual_seed(0)) * 4095
        assert (levels - levels.round()).abs().max() < 1e-3
        continuous = ImageFormat("RGB", 3, (0, 1), None)
        exact = make_source(image, "grayscale", continuous)
        torch.testing.assert_close(
            exact[0], torch.einsum("c,chw->hw", torch.tensor([0.299, 0.587, 0.114]), image), rtol=0, atol=2e-5
        )

    def test_in_a_dataset(self, tmp_path):
        path = tmp_path / "a.parquet"
        images = [Image.fromarray((photo(seed) * 255).byte().permute(1, 2, 0).numpy()) for seed in range(3)]
        pyarrow.parquet.write_table(pyarrow.table({"image": [encoded(image) for image in images]}), path)
        dataset, _ = load_image_dataset(data_files=str(path))
        plain_dataset = ImageDataset(dataset, 8, random_flip=True)
        grey = MadeSourceDataset(dataset, 8, random_flip=True, source="grayscale")
        noisy = MadeSourceDataset(dataset, 8, random_flip=True, source="noise")
        for index in range(3):
            expected = plain_dataset[index]["images"]
            example = grey[index]
            assert torch.equal(example["images"], expected)
            assert torch.equal(example["conditions"], grayscale(expected / 2 + 0.5))
        assert torch.equal(noisy[1]["conditions"], noisy[1]["conditions"])
        first = noisy[1]["conditions"]
        assert not torch.equal(first, noisy[2]["conditions"])
        noisy.set_epoch(1)
        assert not torch.equal(first, noisy[1]["conditions"])
