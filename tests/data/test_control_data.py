"""Images with conditions: both under one crop and flip, made or read; and conditions that cannot be used."""

import io
import os
import sys

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from diffusers_adm.conditioning.control_images import CONDITIONS, make_condition
from diffusers_adm.training import EpochShuffleSampler, ImageDataset, check_images, load_image_dataset


def noise(seed, size=(16, 16)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def ramps(size):
    """Red tells the place from left to right, green from top to bottom, in fractions of the picture."""
    x, y = ((np.arange(side) + 0.5) / side * 255 for side in size)
    red, green = np.meshgrid(x, y)
    return Image.fromarray(np.stack([red, green, 0 * red], axis=-1).round().astype(np.uint8))


def encoded(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def write_parquet(path, **columns):
    def to_bytes(value):
        return encoded(value) if isinstance(value, Image.Image) else value

    pyarrow.parquet.write_table(
        pyarrow.table({name: [to_bytes(value) for value in values] for name, values in columns.items()}), path
    )
    return str(path)


def from_images(images, conditions=None):
    columns = {"image": [encoded(image) for image in images]}
    if conditions is not None:
        columns["conditioning_image"] = [encoded(condition) for condition in conditions]
    features = datasets.Features({name: datasets.Image(decode=False) for name in columns})
    return datasets.Dataset.from_dict(columns, features=features)


class TestAlignment:
    @pytest.mark.parametrize("size", [(16, 16), (24, 16), (16, 40), (60, 45)])
    def test_a_condition_that_is_the_image_stays_it(self, size):
        image = noise(0, size)
        dataset = ImageDataset(from_images([image], [image]), 16, random_flip=True)
        plain, seen = ImageDataset(from_images([image]), 16, random_flip=True), set()
        for epoch in range(20):
            dataset.set_epoch(epoch)
            plain.set_epoch(epoch)
            example = dataset[0]
            assert set(example) == {"images", "conditions", "index"}
            assert (example["conditions"].dtype, example["conditions"].shape) == (torch.float32, (3, 16, 16))
            assert torch.equal(example["images"], plain[0]["images"])
            levels = ((example["images"] + 1) * 127.5).round()
            assert torch.equal(example["conditions"], levels / 255)
            seen.add(levels.sum().item() if size[0] != size[1] else levels[0, 0, 0].item())
        assert len(seen) > 1  # crops, or flips where there is nothing to crop

    @pytest.mark.parametrize(
        "size,condition_size",
        [((48, 32), (24, 16)), ((100, 67), (50, 33)), ((40, 67), (121, 200)), ((20, 20), (64, 64))],
    )
    def test_a_condition_of_another_size_shows_the_same_part(self, size, condition_size):
        dataset = ImageDataset(from_images([ramps(size)], [ramps(condition_size)]), 16, random_flip=True)
        for epoch in range(20):
            dataset.set_epoch(epoch)
            example = dataset[0]
            # Bicubic filters straighten ramps except at the ends, by up to half a (large) pixel there.
            difference = (example["conditions"] - (example["images"] + 1) / 2).abs()
            assert difference[:2, 1:-1, 1:-1].max() < 0.5 / 16

    def test_the_size_that_is_cropped_is_the_one_of_the_image(self):
        """By itself, the condition would be resized to 31 pixels instead of 32, and other crops would fit into it."""
        image, condition = ramps((128, 64)), ramps((25, 13))
        dataset = ImageDataset(from_images([image], [condition]), 16)
        lefts = []
        for epoch in range(200):
            dataset.set_epoch(epoch)
            example = dataset[0]
            lefts.append([(example["images"][0, 8, 8].item() + 1) / 2, example["conditions"][0, 8, 8].item()])
        lefts = np.array(lefts)
        assert abs(lefts[:, 0] - lefts[:, 1]).max() < 0.5 / 25
        assert lefts[:, 0].max() - lefts[:, 0].min() > 0.45  # of the 0.5 that the crop can move


class TestMadeConditions:
    @pytest.mark.parametrize("kind", list(CONDITIONS))
    def test_are_made_from_the_cropped_and_flipped_image(self, kind):
        dataset = ImageDataset(from_images([noise(0, (20, 17))]), 16, random_flip=True, condition=kind)
        for epoch in range(4):
            dataset.set_epoch(epoch)
            example = dataset[0]
            assert torch.equal(example["conditions"], make_condition((example["images"] + 1) / 2, kind))

    @pytest.mark.parametrize("kind", list(CONDITIONS))
    def test_are_those_of_a_column_that_was_made_before(self, tmp_path, kind):
        images = [noise(seed, (16, 16)) for seed in range(3)]
        conditions = [make_condition(image, kind) for image in images]
        path = write_parquet(tmp_path / "data.parquet", picture=images, hint=conditions)
        read, _ = load_image_dataset(data_files=path, image_column="picture", conditioning_image_column="hint")
        stored = ImageDataset(read, 16)
        made = ImageDataset(load_image_dataset(data_files=path, image_column="picture")[0], 16, condition=kind)
        for ours, theirs in zip(made, stored, strict=True):
            assert torch.equal(ours["images"], theirs["images"])
            assert torch.equal(ours["conditions"], theirs["conditions"])
        assert not torch.equal(made[0]["conditions"], made[1]["conditions"])

    @pytest.mark.parametrize("condition", ["edges", None])
    def test_any_number_of_workers_gives_the_same(self, condition):
        images = [noise(seed, (20, 24)) for seed in range(6)]
        data = from_images(images, None if condition else [image.rotate(180) for image in images])

        def batches(num_workers):
            dataset = ImageDataset(data, 16, random_flip=True, seed=5, condition=condition)
            sampler = EpochShuffleSampler(dataset)
            loader = torch.utils.data.DataLoader(dataset, batch_size=3, sampler=sampler, num_workers=num_workers)
            for epoch in range(2):
                dataset.set_epoch(epoch)
                yield from loader

        alone, workers = list(batches(0)), list(batches(2))
        assert len(alone) == len(workers) == 4
        for a, b in zip(alone, workers, strict=True):
            assert torch.equal(a["conditions"], b["conditions"])
            assert torch.equal(a["images"], b["images"])
        assert not torch.equal(alone[0]["conditions"], alone[2]["conditions"])


class TestLoading:
    def test_columns_may_swap_names_and_a_subset_keeps_pairs(self, tmp_path):
        targets, hints = [noise(i) for i in range(8)], [noise(100 + i) for i in range(8)]
        path = write_parquet(
            tmp_path / "data.parquet",
            conditioning_image=targets,
            image=hints,
            kind=list("abababab"),
            text=list("stuvwxyz"),
        )
        dataset, id2label = load_image_dataset(
            data_files=path,
            image_column="conditioning_image",
            conditioning_image_column="image",
            label_column="kind",
            caption_column="text",
            max_train_samples=5,
        )
        assert dataset.column_names == ["image", "conditioning_image", "row", "label", "caption"]
        assert id2label == {0: "a", 1: "b"}
        assert len(dataset) == 5
        for example in dataset:
            row = example["row"]
            assert example["image"]["bytes"] == encoded(targets[row])["bytes"]
            assert example["conditioning_image"]["bytes"] == encoded(hints[row])["bytes"]
            assert (example["label"], example["caption"]) == (row % 2, "stuvwxyz"[row])

    def test_a_folder_with_metadata(self, tmp_path):
        for name in ("a", "b"):
            noise(ord(name)).save(tmp_path / f"{name}.png")
            noise(ord(name) + 9).save(tmp_path / f"{name}_hint.png")
        (tmp_path / "metadata.csv").write_text("file_name,hint_file_name\na.png,a_hint.png\nb.png,b_hint.png\n")
        dataset, _ = load_image_dataset(train_data_dir=str(tmp_path), conditioning_image_column="hint")
        paths = [
            [os.path.basename(row[column]["path"]) for column in ("image", "conditioning_image")] for row in dataset
        ]
        assert paths == [["a.png", "a_hint.png"], ["b.png", "b_hint.png"]]
        assert len(check_images(dataset, 16)[0]) == 2

    def test_errors(self, tmp_path):
        path = write_parquet(tmp_path / "data.parquet", image=[noise(0)], hint=[noise(1)], kind=["a"], number=[3])

        def load(column, **options):
            load_image_dataset(data_files=path, conditioning_image_column=column, **options)

        with pytest.raises(
            ValueError, match="`conditioning_image_column` is 'edge', but .* has the columns image, hint"
        ):
            load("edge")
        with pytest.raises(ValueError, match="`conditioning_image_column` 'number' of .* is of type .*int64.* cannot"):
            load("number")
        with pytest.raises(ValueError, match="`image_column` and `conditioning_image_column` are both 'image'"):
            load("image")
        with pytest.raises(ValueError, match="`label_column` and `conditioning_image_column` are both 'kind'"):
            load("kind", label_column="kind")
        with pytest.raises(ValueError, match="`caption_column` and `conditioning_image_column` are both 'kind'"):
            load("kind", caption_column="kind")

    def test_a_kind_or_a_column(self):
        plain, paired = from_images([noise(0)]), from_images([noise(0)], [noise(1)])
        assert set(ImageDataset(plain, 16)[0]) == {"images", "index"}
        with pytest.raises(ValueError, match="`condition` is 'edges', but the dataset has a `conditioning_image`"):
            ImageDataset(paired, 16, condition="edges")
        with pytest.raises(ValueError, match="`kind` is 'depth'"):
            ImageDataset(plain, 16, condition="depth")

    def test_the_earlier_name(self):
        with pytest.warns(FutureWarning, match="`diffusers_adm.training.ControlDataset` is now"):
            from diffusers_adm.training import ControlDataset
        assert ControlDataset is ImageDataset

    def test_a_missing_package_shows_before_training(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "skimage.feature", None)
        with pytest.raises(ImportError, match="scikit-image"):
            ImageDataset(from_images([noise(0)]), 16, condition="edges")


class TestUnusableConditions:
    def test_are_left_out_and_reported(self, tmp_path, caplog):
        good = encoded(noise(0))
        cut = {"bytes": good["bytes"][:60], "path": "cut.png"}
        text = {"bytes": b"no image", "path": None}
        wide = noise(5, (32, 16))
        hints = [noise(1), cut, None, text, wide, noise(2, (8, 8))]
        path = write_parquet(tmp_path / "data.parquet", image=[noise(i) for i in range(6)], hint=hints)
        dataset, _ = load_image_dataset(data_files=path, conditioning_image_column="hint")
        kept, skipped = check_images(dataset, 16, output_dir=tmp_path / "out")
        assert kept["row"][:] == [0, 5]
        assert skipped == {
            "no usable condition": ["row 1", "row 2", "row 3"],
            "condition of another aspect ratio": ["row 4"],
        }
        report = (tmp_path / "out" / "skipped_images.txt").read_text().splitlines()
        assert report[0].startswith("no usable condition\trow 1\tthe condition cut.png is unreadable: ")
        assert report[1:] == [
            "no usable condition\trow 2\tthe condition is missing: the entry is empty",
            "no usable condition\trow 3\tthe condition is unreadable: not an image that Pillow knows",
            "condition of another aspect ratio\trow 4\tthe condition has 16 x 32 pixels, its image 16 x 16 "
            "(height x width)",
        ]
        assert "4 of 6 images are left out" in caplog.text

    @pytest.mark.parametrize("argument", ["--condition_value_range", "--source_value_range"])
    def test_few_values(self, tmp_path, caplog, argument):
        regions = [Image.fromarray(np.full((16, 16), value, np.uint8)) for value in (0, 1, 5)]
        path = write_parquet(tmp_path / "data.parquet", image=[noise(i) for i in range(3)], hint=regions)
        dataset, _ = load_image_dataset(data_files=path, conditioning_image_column="hint")
        check_images(dataset, 16, condition_range_argument=argument)
        ways = f"`{argument} auto` or `{argument} 0 7`"
        assert f"The conditioning images range from 0 to 5 and fill 2% of 0 to 255: pass {ways}." in caplog.text
        assert "The images" not in caplog.text
        assert "no 8-bit value above 1" not in caplog.text

    @pytest.mark.parametrize(
        "size,condition_size,fits",
        [
            ((64, 64), (64, 64), True),
            ((64, 64), (64, 63), True),
            ((64, 64), (64, 60), False),
            ((60, 40), (40, 60), False),
            # Halves and tenths of odd sides, however rounded.
            ((101, 67), (51, 33), True),
            ((101, 67), (50, 34), True),
            ((1000, 101), (100, 10), True),
            ((1000, 101), (100, 13), False),
            ((16, 16), (512, 512), True),
            ((16, 16), (512, 500), False),
        ],
    )
    def test_aspect_ratios(self, size, condition_size, fits):
        dataset = from_images([noise(0), noise(1, size)], [noise(0), noise(1, condition_size)])
        kept, skipped = check_images(dataset, 8)
        assert len(kept) == 1 + fits
        assert skipped == ({} if fits else {"condition of another aspect ratio": ["row 1"]})
        examples = ImageDataset(dataset, 8, center_crop=True)
        took_another = torch.equal(examples[1]["images"], examples[0]["images"])
        assert took_another == (not fits)

    def test_one_that_vanishes_takes_its_image_along(self, tmp_path, caplog):
        for i in range(3):
            noise(i).save(tmp_path / f"{i}.png")
            noise(10 + i).save(tmp_path / f"{i}_hint.png")
        rows = [{"image": str(tmp_path / f"{i}.png"), "hint": str(tmp_path / f"{i}_hint.png")} for i in range(3)]
        path = write_parquet(tmp_path / "data.parquet", **{k: [row[k] for row in rows] for k in ("image", "hint")})
        dataset = ImageDataset(load_image_dataset(data_files=path, conditioning_image_column="hint")[0], 16)
        expected = dataset[2]
        os.remove(tmp_path / "1_hint.png")
        for _ in range(2):
            example = dataset[1]
            assert torch.equal(example["images"], expected["images"])
            assert torch.equal(example["conditions"], expected["conditions"])
        assert caplog.text.count("1.png became no usable condition (the condition ") == 1

    def test_verdicts_are_kept_for_each_column(self, tmp_path):
        """A cached verdict on the images alone says nothing of their conditions, nor one column of another."""
        broken = {"bytes": b"x", "path": None}
        columns = {"image": [noise(0), noise(1)], "good": [noise(2), noise(3)], "bad": [noise(4), broken]}
        path = write_parquet(tmp_path / "data.parquet", **columns)

        def usable(column):
            dataset, _ = load_image_dataset(
                data_files=path, conditioning_image_column=column, cache_dir=str(tmp_path / "cache")
            )
            return len(check_images(dataset, 16)[0])

        def stamps():
            return {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("cache-*.arrow")}

        assert [usable(column) for column in (None, "good", "bad")] == [2, 2, 1]
        first = stamps()
        assert len(first) == 3
        assert [usable(column) for column in ("bad", None, "good")] == [1, 2, 2]
        assert stamps() == first

    def test_transparency_is_black(self):
        hint = Image.new("RGBA", (16, 16), (255, 255, 255, 0))
        hint.paste((255, 255, 255, 255), (4, 4, 8, 8))
        conditions = ImageDataset(from_images([noise(0)], [hint]), 16)[0]["conditions"]
        expected = torch.zeros(3, 16, 16)
        expected[:, 4:8, 4:8] = 1
        assert torch.equal(conditions, expected)
