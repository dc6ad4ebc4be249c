"""Data: real files of every kind that goes wrong; tensors that depend on the seed, the epoch and the index alone."""

import contextlib
import io
import json
import logging
import os
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from PIL import Image
from processes import run_distributed
from runs import EMOJI, flags

from diffusers_adm.data import tokenizer
from diffusers_adm.data.checks import check_batch_fits, check_images
from diffusers_adm.data.columns import load_image_dataset
from diffusers_adm.data.decoding import MISSING, UnusableImageError, decode_rgb
from diffusers_adm.data.images import ImageDataset
from diffusers_adm.data.samplers import EpochShuffleSampler
from diffusers_adm.training import DataArguments, TrainingArguments, build_dataloader


def noise(seed, size=(16, 16)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def encoded(image, image_format="PNG", **options):
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return {"bytes": file.getvalue(), "path": None}


def write_folder(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content) if isinstance(content, bytes) else content.save(path)
    return str(root)


def from_images(images, labels=None):
    features = {"image": datasets.Image(decode=False)}
    columns = {"image": [encoded(image) for image in images]}
    if labels is not None:
        columns["label"], features["label"] = labels, datasets.Value("int64")
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def sums_of_two_epochs():
    """For each of two epochs, a fingerprint of the tensor of each example that this process is given."""
    dataset = ImageDataset(from_images([noise(i, (20, 24)) for i in range(8)], list(range(8))), 16, random_flip=True)
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, sampler=EpochShuffleSampler(dataset))
    loader = Accelerator(cpu=True).prepare(loader)
    weight = torch.arange(3 * 16 * 16).view(3, 16, 16).double()
    epochs = []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        epochs.append(
            {
                label.item(): (image * weight).sum().item()
                for batch in loader
                for image, label in zip(batch["images"], batch["class_labels"], strict=True)
            }
        )
    return epochs


def count_usable(folder, cache_dir):
    dataset, _ = load_image_dataset(train_data_dir=folder, label_column="label", cache_dir=cache_dir)
    return len(check_images(dataset, 8)[0])


class TestDecode:
    """Every pixel format becomes the RGB that a viewer on a white page would show."""

    def test_grey(self):
        assert decode_rgb(encoded(Image.new("L", (3, 2), 77))).getpixel((0, 0)) == (77, 77, 77)

    def test_bilevel(self):
        assert decode_rgb(encoded(Image.new("1", (3, 2), 1))).getpixel((0, 0)) == (255, 255, 255)

    @pytest.mark.parametrize("mode,color", [("RGBA", (200, 0, 0, 51)), ("LA", (200, 51))])
    @pytest.mark.parametrize("background", [(255, 255, 255), (0, 100, 200)])
    def test_alpha_is_composited(self, mode, color, background):
        pixel = decode_rgb(encoded(Image.new(mode, (3, 2), color)), background).getpixel((1, 1))
        foreground = color[:3] if mode == "RGBA" else (color[0],) * 3
        expected = [0.2 * f + 0.8 * b for f, b in zip(foreground, background, strict=True)]  # alpha is 51 / 255
        np.testing.assert_allclose(pixel, expected, atol=1)

    def test_transparent_palette_entry(self):
        image = Image.new("P", (2, 1))
        image.putpalette([255, 0, 0, 0, 0, 255])
        image.putdata([0, 1])
        decoded = decode_rgb(encoded(image, transparency=1))
        assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]

    def test_transparent_color_of_rgb_and_grey(self):
        for image, key in ((Image.new("RGB", (2, 2), (1, 2, 3)), (1, 2, 3)), (Image.new("L", (2, 2), 9), 9)):
            assert decode_rgb(encoded(image, transparency=key)).getpixel((0, 0)) == (255, 255, 255)

    def test_cmyk(self):
        # Full magenta absorbs green alone.
        decoded = decode_rgb(encoded(Image.new("CMYK", (16, 16), (0, 255, 0, 0)), "JPEG", quality=100))
        np.testing.assert_allclose(decoded.getpixel((8, 8)), (255, 0, 255), atol=3)

    @pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
    def test_sixteen_bit_grey_is_scaled(self, image_format):
        values = np.array([[0, 257, 128 * 257, 65535, 300]], dtype=np.uint16)
        decoded = decode_rgb(encoded(Image.fromarray(values), image_format))
        np.testing.assert_array_equal(np.asarray(decoded)[0, :, 0], [0, 1, 128, 255, 1])

    def test_sixteen_bit_pgm_is_scaled(self):
        pgm = b"P5 2 1 65535\n" + struct.pack(">2H", 65535, 128 * 257)
        decoded = decode_rgb({"bytes": pgm, "path": None})
        np.testing.assert_array_equal(np.asarray(decoded)[0, :, 0], [255, 128])

    def test_floating_point_is_refused_rather_than_clipped(self):
        with pytest.raises(UnusableImageError, match="no known range"):
            decode_rgb(encoded(Image.fromarray(np.full((4, 4), 1000.0, dtype=np.float32)), "TIFF"))

    def test_exif_orientation(self):
        image = Image.new("RGB", (8, 4), (0, 0, 255))
        image.paste((255, 0, 0), (0, 0, 2, 4))
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera was held so that viewers turn the picture clockwise: left becomes top
        decoded = decode_rgb(encoded(image, exif=exif))
        assert decoded.size == (4, 8)
        assert decoded.getpixel((0, 0)) == (255, 0, 0)
        assert decoded.getpixel((0, 7)) == (0, 0, 255)

    @pytest.mark.filterwarnings("ignore::UserWarning:PIL")
    def test_malformed_exif_does_not_cost_the_image(self):
        image = encoded(Image.new("RGB", (8, 4)), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01")
        assert decode_rgb(image).size == (8, 4)

    def test_animation_gives_its_first_frame(self):
        frames = [Image.new("RGB", (4, 4), color) for color in ((255, 0, 0), (0, 255, 0))]
        decoded = decode_rgb(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
        assert decoded.getpixel((0, 0)) == (255, 0, 0)

    @pytest.mark.filterwarnings("ignore::UserWarning:PIL")
    @pytest.mark.parametrize("image_format", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
    def test_a_truncated_file_is_unusable(self, image_format):
        data = encoded(noise(0, (40, 40)), image_format)["bytes"]
        for length in range(0, len(data) // 2, max(1, len(data) // 40)):
            with pytest.raises(UnusableImageError):
                decode_rgb({"bytes": data[:length], "path": None})

    @pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
    def test_corruption_anywhere_never_escapes(self):
        generator = np.random.default_rng(0)
        for image_format in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"):
            data = np.frombuffer(encoded(noise(0, (20, 20)), image_format)["bytes"], dtype=np.uint8)
            for _ in range(60):
                damaged = data.copy()
                damaged[generator.integers(0, min(300, len(data)), 8)] = generator.integers(0, 256, 8)
                with contextlib.suppress(UnusableImageError):
                    assert decode_rgb({"bytes": damaged.tobytes(), "path": None}).mode == "RGB"

    def test_decompression_bomb(self):
        # A valid header of 30000 x 30000 pixels is enough for the refusal; nothing of that size is decoded.
        data = bytearray(encoded(Image.new("L", (8, 8)))["bytes"])
        header = b"IHDR" + struct.pack(">IIBBBBB", 30000, 30000, 8, 0, 0, 0, 0)
        data[12:33] = header + struct.pack(">I", zlib.crc32(header))
        with pytest.raises(UnusableImageError, match="exceeds limit") as caught:
            decode_rgb({"bytes": bytes(data), "path": None})
        assert "bomb" in caught.value.reason


class TestImageFolder:
    def test_labels_are_folder_names_and_files_in_the_root_are_unlabelled(self, tmp_path):
        files = {"loose.png": noise(0), "dog/a.jpg": noise(1), "cat/b.PNG": noise(2), "cat/c.webp": noise(3)}
        dataset, id2label = load_image_dataset(train_data_dir=write_folder(tmp_path, files), label_column="label")
        assert id2label == {0: "cat", 1: "dog"}
        found = {os.path.basename(row["image"]["path"]): row["label"] for row in dataset}
        assert found == {"b.PNG": 0, "c.webp": 0, "a.jpg": 1, "loose.png": -1}
        assert dataset.column_names == ["image", "row", "label"]

    def test_without_label_column(self, tmp_path):
        folder = write_folder(tmp_path, {"a.png": noise(0), "deep/er/b.png": noise(1)})
        dataset, id2label = load_image_dataset(train_data_dir=folder)
        assert id2label is None
        assert dataset.column_names == ["image", "row"]
        assert len(dataset) == 2

    def test_a_class_named_train_is_a_class(self, tmp_path):
        folder = write_folder(tmp_path, {f"{name}/a.png": noise(0) for name in ("bus", "train", "car")})
        dataset, id2label = load_image_dataset(train_data_dir=folder, label_column="label")
        assert (len(dataset), id2label) == (3, {0: "bus", 1: "car", 2: "train"})

    def test_split_folders_are_kept_apart(self, tmp_path):
        files = {"train/cat/a.png": noise(0), "train/dog/a.png": noise(1), "test/cat/b.png": noise(2)}
        folder = write_folder(tmp_path, files)
        assert len(load_image_dataset(train_data_dir=folder, label_column="label")[0]) == 2
        assert len(load_image_dataset(train_data_dir=folder, split="test")[0]) == 1
        with pytest.raises(ValueError, match="`split` is 'holdout', but .* Its folders are test, train"):
            load_image_dataset(train_data_dir=folder, split="holdout")

    def test_hidden_and_other_files(self, tmp_path, caplog):
        files = {"a.png": noise(0), "._a.png": b"x", ".cache/b.png": noise(1), "__MACOSX/c.png": b"", "notes.txt": b""}
        dataset, _ = load_image_dataset(train_data_dir=write_folder(tmp_path, files))
        assert len(dataset) == 1
        assert "1 x .txt" in caplog.text

    def test_folders_that_give_no_class_are_named(self, tmp_path, caplog):
        """One without images, and one that is met again under another name."""
        folder = write_folder(tmp_path, {"cat/a.png": noise(0), "dog/a.png": noise(1), "eel/a.txt": b"x"})
        os.mkdir(tmp_path / "fox")
        os.symlink(tmp_path / "dog", tmp_path / "ape")
        dataset, id2label = load_image_dataset(train_data_dir=folder, label_column="label")
        assert list(id2label.values()) == ["ape", "cat"]
        assert "Folders without images give no class: eel, fox." in caplog.text
        assert f"{tmp_path / 'dog'} is the same folder as {tmp_path / 'ape'}, by a link" in caplog.text
        caplog.clear()
        load_image_dataset(train_data_dir=folder)  # without classes, an empty folder is no matter
        assert "Folders without images" not in caplog.text

    def test_links_to_folders_are_followed_and_loops_end(self, tmp_path):
        write_folder(tmp_path, {"elsewhere/cat/a.png": noise(0), "data/dog/b.png": noise(1)})
        os.symlink(tmp_path / "elsewhere" / "cat", tmp_path / "data" / "cat")
        os.symlink(tmp_path / "data", tmp_path / "data" / "loop")
        dataset, id2label = load_image_dataset(train_data_dir=str(tmp_path / "data"), label_column="label")
        assert (len(dataset), id2label) == (2, {0: "cat", 1: "dog"})

    def test_metadata_file_gives_the_columns(self, tmp_path):
        files = {"a.png": noise(0), "b.png": noise(1), "metadata.csv": b"file_name,kind\na.png,old\nb.png,new\n"}
        folder = write_folder(tmp_path / "with [brackets]", files)
        dataset, id2label = load_image_dataset(train_data_dir=folder, label_column="kind")
        assert (dataset["label"][:], id2label) == ([1, 0], {0: "new", 1: "old"})
        assert len(check_images(dataset, resolution=16)[0]) == 2

    def test_errors(self, tmp_path):
        with pytest.raises(ValueError, match="is not a folder"):
            load_image_dataset(train_data_dir=str(tmp_path / "nowhere"))
        with pytest.raises(ValueError, match="holds no images .other files: none"):
            load_image_dataset(train_data_dir=write_folder(tmp_path / "empty", {".keep": b""}))
        with pytest.raises(ValueError, match="holds no images .other files: 1 x .zip"):
            load_image_dataset(train_data_dir=write_folder(tmp_path / "zip", {"images.zip": b""}))
        flat = write_folder(tmp_path / "flat", {"a.png": noise(0)})
        with pytest.raises(ValueError, match="Sort them into one folder per class"):
            load_image_dataset(train_data_dir=flat, label_column="label")
        with pytest.raises(ValueError, match="`label_column` is 'kind', but .* has the columns image, label"):
            load_image_dataset(train_data_dir=flat, label_column="kind")


class TestParquet:
    @pytest.fixture
    def write(self, tmp_path):
        def write(labels, column="label", name="data.parquet", images=None, label_type=None):
            images = images or [encoded(noise(index)) for index in range(len(labels))]
            table = pyarrow.table({"image": images, column: pyarrow.array(labels, type=label_type)})
            pyarrow.parquet.write_table(table, tmp_path / name)
            return str(tmp_path / name)

        return write

    def load_labels(self, path, column="label"):
        dataset, id2label = load_image_dataset(data_files=path, label_column=column)
        return dataset["label"][:], id2label

    def test_integers_with_gaps(self, write):
        assert self.load_labels(write([30, 10, None, 20, -1, 10])) == (
            [2, 0, -1, 1, -1, 0],
            {0: "10", 1: "20", 2: "30"},
        )

    def test_floats_with_nan(self, write):
        labels = self.load_labels(write([3.0, float("nan"), 1.0, None]))
        assert labels == ([1, -1, 0, -1], {0: "1", 1: "3"})

    def test_text(self, write):
        assert self.load_labels(write(["zebra", None, "ant", ""])) == ([1, -1, 0, -1], {0: "ant", 1: "zebra"})

    def test_booleans(self, write):
        assert self.load_labels(write([True, False])) == ([1, 0], {0: "False", 1: "True"})

    def test_class_labels_keep_their_ids_and_unused_names(self, tmp_path):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["z", "m", "a"])})
        columns = {"image": [noise(0), noise(1), noise(2)], "label": ["a", "z", None]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "data.parquet")
        assert self.load_labels(str(tmp_path / "data.parquet")) == ([2, 0, -1], {0: "z", 1: "m", 2: "a"})

    def test_class_labels_beyond_the_names(self, tmp_path):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
        table = pyarrow.table({"image": [encoded(noise(0))], "label": [2]})
        table = table.replace_schema_metadata(features.arrow_schema.metadata)
        pyarrow.parquet.write_table(table, tmp_path / "data.parquet")
        with pytest.raises(ValueError, match="holds 2, but its class names end at 1"):
            self.load_labels(str(tmp_path / "data.parquet"))

    def test_image_column_of_bytes_and_of_paths(self, tmp_path):
        noise(5).save(tmp_path / "a.png")
        data = (tmp_path / "a.png").read_bytes()
        for name, values in (("bytes", [data]), ("path", [str(tmp_path / "a.png")])):
            pyarrow.parquet.write_table(pyarrow.table({"picture": values}), tmp_path / f"{name}.parquet")
            dataset, _ = load_image_dataset(data_files=str(tmp_path / f"{name}.parquet"), image_column="picture")
            assert np.array_equal(decode_rgb(dataset[0]["image"]), noise(5))

    def test_several_files_patterns_and_slices(self, write, tmp_path):
        for name in ("a.parquet", "b.parquet"):
            write([0, 1, 2], name=name)
        assert len(load_image_dataset(data_files=str(tmp_path / "*.parquet"))[0]) == 6
        assert len(load_image_dataset(data_files=[str(tmp_path / "a.parquet")], split="train[:2]")[0]) == 2

    def test_max_train_samples_is_a_seeded_subset_with_all_classes(self, write):
        path = write([index // 10 for index in range(40)])

        def subset(seed):
            return load_image_dataset(data_files=path, label_column="label", max_train_samples=8, seed=seed)

        rows = subset(0)[0]["row"][:]
        assert rows == sorted(rows) == subset(0)[0]["row"][:] != subset(1)[0]["row"][:]
        assert len(set(rows)) == 8
        assert subset(0)[1] == {0: "0", 1: "1", 2: "2", 3: "3"}

    @pytest.mark.parametrize(
        "labels,message",
        [
            ([0.5, 1.0], "holds 0.5, which is no class"),
            ([[1], [2]], "holds list values"),
            ([None, None], "holds no label at all"),
        ],
    )
    def test_labels_that_are_none(self, write, labels, message):
        with pytest.raises(ValueError, match=message):
            self.load_labels(write(labels))

    def test_errors(self, write, tmp_path):
        path = write([0, 1])
        with pytest.raises(ValueError, match="`image_column` is 'picture', but .* has the columns image, label"):
            load_image_dataset(data_files=path, image_column="picture")
        with pytest.raises(ValueError, match="no split 'holdout'. Should be one of .*train"):
            load_image_dataset(data_files=path, split="holdout")
        with pytest.raises(ValueError, match="cannot hold images"):
            load_image_dataset(data_files=path, image_column="label")
        with pytest.raises(ValueError, match="both 'image'"):
            load_image_dataset(data_files=path, label_column="image")
        path = str(tmp_path / "text.parquet")
        pyarrow.parquet.write_table(pyarrow.table({"image": ["", None, "a cat", "a dog"]}), path)
        with pytest.raises(
            ValueError, match="`image_column` 'image' .* text that is no path of a file, such as 'a cat'"
        ):
            load_image_dataset(data_files=path)
        with pytest.raises(ValueError, match="`data_files` cannot be read as parquet: .*other.parquet"):
            load_image_dataset(data_files=str(tmp_path / "other.parquet"))
        (tmp_path / "data.csv").write_text("image,label\na.png,b\n")
        with pytest.raises(ValueError, match="cannot be read as parquet: .*magic bytes"):
            load_image_dataset(data_files=str(tmp_path / "data.csv"))
        (tmp_path / "broken.parquet").write_bytes(b"PAR1 nonsense")
        with pytest.raises(ValueError, match="cannot be read as parquet"):
            load_image_dataset(data_files=str(tmp_path / "broken.parquet"))
        pyarrow.parquet.write_table(pyarrow.table({"image": ["a.png"]}).slice(0, 0), tmp_path / "empty.parquet")
        with pytest.raises(ValueError, match="empty.parquet has no rows"):
            load_image_dataset(data_files=str(tmp_path / "empty.parquet"))
        with pytest.raises(ValueError, match="corresponds to no data"):
            load_image_dataset(data_files=path, split="train[:0]")

    def test_source_errors(self, write):
        with pytest.raises(ValueError, match="Got no data source. Pass exactly one of"):
            load_image_dataset()
        with pytest.raises(ValueError, match="Got `train_data_dir` and `data_files`"):
            load_image_dataset(train_data_dir="a", data_files="b.parquet")
        with pytest.raises(ValueError, match="only applies to `dataset_name`"):
            load_image_dataset(train_data_dir="a", dataset_config_name="default")
        with pytest.raises(ValueError, match="`max_train_samples` is 0"):
            load_image_dataset(train_data_dir="a", max_train_samples=0)

    def test_further_columns_are_tensors_of_the_examples(self, tmp_path):
        columns = {"picture": [encoded(noise(i)) for i in range(3)], "clip": [[i, 0.5, -1.0] for i in range(3)]}
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "data.parquet")
        options = {"data_files": str(tmp_path / "data.parquet"), "image_column": "picture"}
        dataset, _ = load_image_dataset(**options, tensor_columns={"image_embeds": "clip"})
        dataset, _ = check_images(dataset, 8)
        for index, example in enumerate(ImageDataset(dataset, 16)):
            assert set(example) == {"index", "images", "image_embeds"}
            assert torch.equal(example["image_embeds"], torch.tensor([index, 0.5, -1.0]))  # float32
        with pytest.raises(ValueError, match=r"`tensor_columns\['image_embeds'\]` is 'embeds', but .* has the columns"):
            load_image_dataset(**options, tensor_columns={"image_embeds": "embeds"})
        with pytest.raises(ValueError, match=r"`tensor_columns\['pixels'\]` and `image_column` are both 'picture'"):
            load_image_dataset(**options, tensor_columns={"pixels": "picture"})


class TestCheck:
    @pytest.fixture
    def folder(self, tmp_path):
        good = encoded(noise(0), "JPEG")["bytes"]
        files = {
            "cat/good.png": noise(1),
            "cat/truncated.jpg": good[: len(good) // 2],
            "cat/text.png": b"this is not an image",
            "dog/empty.png": b"",
            "dog/tiny.png": noise(2, (30, 3)),
            "dog/good.png": noise(3),
            "loose.png": noise(4),
        }
        return write_folder(tmp_path / "data", files)

    @pytest.mark.parametrize("num_proc", [None, 2])
    def test_what_is_left_out_and_the_report(self, folder, tmp_path, caplog, num_proc):
        dataset, _ = load_image_dataset(train_data_dir=folder, label_column="label")
        os.remove(os.path.join(folder, "dog", "good.png"))
        kept, skipped = check_images(dataset, 8, allow_unlabelled=False, num_proc=num_proc, output_dir=tmp_path / "out")
        assert [row["image"]["path"] for row in kept] == [os.path.join(folder, "cat", "good.png")]
        names = {reason: sorted(map(os.path.basename, paths)) for reason, paths in skipped.items()}
        assert names == {
            "unreadable": ["empty.png", "text.png", "truncated.jpg"],
            "missing": ["good.png"],
            "too small": ["tiny.png"],
            "no label": ["loose.png"],
        }
        report = (tmp_path / "out" / "skipped_images.txt").read_text().splitlines()
        assert len(report) == 6
        assert f"too small\t{folder}/dog/tiny.png\t3 x 30 pixels (height x width), shorter side below 4" in report
        assert "6 of 7 images are left out" in caplog.text
        assert "truncated.jpg" in caplog.text

    def test_classes_that_lose_all_of_their_images_are_named(self, folder, caplog):
        dataset, id2label = load_image_dataset(train_data_dir=folder, label_column="label")
        check_images(dataset, 8, id2label=id2label)
        assert "No image is left of" not in caplog.text
        os.remove(os.path.join(folder, "dog", "good.png"))
        dataset, id2label = load_image_dataset(train_data_dir=folder, label_column="label")
        check_images(dataset, 8, id2label=id2label)
        assert "No image is left of these classes, so they are not trained: dog." in caplog.text

    def test_unlabelled_are_kept_and_counted(self, folder, caplog):
        dataset, _ = load_image_dataset(train_data_dir=folder, label_column="label")
        kept, skipped = check_images(dataset, 8)
        assert "no label" not in skipped
        assert kept["label"][:].count(-1) == 1
        assert "1 of the remaining images have no label" in caplog.text

    def test_names_in_the_log_are_limited_and_all_in_the_file(self, tmp_path, caplog):
        dataset = datasets.Dataset.from_dict(
            {"image": [encoded(noise(0))] + [{"bytes": b"x", "path": f"{i}.png"} for i in range(5)]},
            features=datasets.Features({"image": datasets.Image(decode=False)}),
        )
        check_images(dataset, 8, output_dir=tmp_path, max_names=2)
        assert "row 1 (0.png), row 2 (1.png) and 3 more" in caplog.text
        assert len((tmp_path / "skipped_images.txt").read_text().splitlines()) == 5
        check_images(dataset.select([0]), 8, output_dir=tmp_path)
        assert not (tmp_path / "skipped_images.txt").exists()  # a report of yesterday would mislead

    def test_names_keep_the_row_of_the_source(self, tmp_path):
        images = [encoded(noise(0))] * 9 + [{"bytes": b"x", "path": None}]
        pyarrow.parquet.write_table(pyarrow.table({"image": images}), tmp_path / "data.parquet")
        dataset, _ = load_image_dataset(data_files=str(tmp_path / "data.parquet"))
        _, skipped = check_images(dataset.select([3, 9]), 8)
        assert skipped == {"unreadable": ["row 9"]}

    def test_nothing_left(self, tmp_path):
        folder = write_folder(tmp_path, {"a.png": b"x", "b.png": noise(0)})
        dataset, _ = load_image_dataset(train_data_dir=folder)
        with pytest.raises(
            ValueError, match="None of the 2 images can be used: 1 unreadable, 1 too small. The first is .*a.png .unrea"
        ):
            check_images(dataset, 64)

    def test_second_launch_uses_the_cache_and_a_replaced_file_is_looked_at_again(self, folder, tmp_path):
        """Launched here and in a second process; the time of the cached verdicts tells whether they were made again."""
        cache = tmp_path / "cache"

        def launch():
            return count_usable(folder, str(cache)), cached()

        def cached():
            return {path: path.stat().st_mtime_ns for path in cache.rglob("cache-*.arrow")}

        count, files = launch()
        assert (count, len(files)) == (3, 1)
        assert run_distributed(count_usable, folder, str(cache), num_processes=1) == [3]
        assert cached() == files
        noise(9).save(os.path.join(folder, "cat", "text.png"))
        count, new_files = launch()
        assert count == 4
        assert len(new_files) == 2

    def test_enough_for_a_batch(self):
        check_batch_fits(8, train_batch_size=4, num_processes=2)
        with pytest.raises(ValueError, match="There are 7 usable images, but one step takes 8 .* to at most 3"):
            check_batch_fits(7, train_batch_size=4, num_processes=2)


class TestImageDataset:
    def test_values_are_exactly_invertible(self):
        ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
        example = ImageDataset(from_images([ramp], [7]), 16)[0]
        images = example["images"]
        assert (images.shape, images.dtype) == ((3, 16, 16), torch.float32)
        assert (images.min().item(), images.max().item()) == (-1.0, 1.0)
        assert np.array_equal(((images + 1) * 127.5).round().permute(1, 2, 0).byte().numpy(), np.asarray(ramp))
        assert (example["class_labels"].dtype, example["class_labels"].item()) == (torch.int64, 7)
        assert set(ImageDataset(from_images([ramp]), 16)[0]) == {"index", "images"}

    def test_channels_rows_and_columns_are_not_mixed_up(self):
        image = Image.new("RGB", (8, 8))
        image.putpixel((5, 2), (255, 0, 0))  # x = 5, y = 2
        images = ImageDataset(from_images([image]), 8)[0]["images"]
        assert images[0].argmax().item() == 2 * 8 + 5
        assert torch.all(images[1:] == -1)

    @pytest.mark.parametrize("size", [(31, 17), (17, 31), (500, 33), (16, 16), (9, 200)])
    @pytest.mark.parametrize("center_crop", [True, False])
    def test_shapes(self, size, center_crop):
        dataset = ImageDataset(from_images([noise(0, size)]), 16, center_crop=center_crop)
        for epoch in range(4):
            dataset.set_epoch(epoch)
            assert dataset[0]["images"].shape == (3, 16, 16)

    def test_resize_is_antialiased(self):
        # Stripes one pixel wide: a filter that only looks at the nearest pixels would keep black or white.
        stripes = Image.fromarray(np.tile(np.array([0, 255], dtype=np.uint8), (128, 64))).convert("RGB")
        images = ImageDataset(from_images([stripes]), 16, center_crop=True)[0]["images"]
        assert images.abs().max() < 0.05

    def test_crops(self):
        wide = Image.fromarray(np.tile(np.arange(24, dtype=np.uint8), (16, 1))).convert("RGB")  # column x holds x

        def left(dataset):
            return round((dataset[0]["images"][0, 0, 0].item() + 1) * 127.5)

        assert left(ImageDataset(from_images([wide]), 16, center_crop=True)) == 4
        dataset, seen = ImageDataset(from_images([wide]), 16), set()
        for epoch in range(100):
            dataset.set_epoch(epoch)
            seen.add(left(dataset))
        assert seen == set(range(9))

    def test_flips_are_half_and_leave_the_crops_alone(self):
        images = from_images([noise(0, (24, 16))])
        plain, flipped = ImageDataset(images, 16, seed=3), ImageDataset(images, 16, random_flip=True, seed=3)
        count = 0
        for epoch in range(400):
            plain.set_epoch(epoch)
            flipped.set_epoch(epoch)
            a, b = plain[0]["images"], flipped[0]["images"]
            assert torch.equal(a, b) or torch.equal(a.flip(-1), b)
            count += torch.equal(a.flip(-1), b)
        assert abs(count - 200) < 50  # five standard deviations

    @pytest.mark.parametrize("persistent", [False, True])
    def test_any_number_of_workers_gives_the_same_tensors(self, persistent):
        images = from_images([noise(index, (20, 24)) for index in range(10)], list(range(10)))

        def epochs(num_workers):
            torch.manual_seed(num_workers)  # a global state that differs must not matter
            dataset = ImageDataset(images, 16, random_flip=True, seed=5)
            loader = torch.utils.data.DataLoader(
                dataset,
                batch_size=3,
                sampler=EpochShuffleSampler(dataset),
                num_workers=num_workers,
                persistent_workers=persistent and num_workers > 0,
            )
            for epoch in range(2):
                dataset.set_epoch(epoch)
                yield from loader

        alone, workers = list(epochs(0)), list(epochs(2))
        assert len(alone) == len(workers) == 8
        for a, b in zip(alone, workers, strict=True):
            assert torch.equal(a["images"], b["images"])
            assert torch.equal(a["class_labels"], b["class_labels"])
        assert sorted(torch.cat([batch["class_labels"] for batch in alone[:4]]).tolist()) == list(range(10))
        assert not torch.equal(alone[0]["class_labels"], alone[4]["class_labels"])

    def test_global_random_state_is_neither_read_nor_changed(self):
        dataset = ImageDataset(from_images([noise(0, (20, 24))]), 16, random_flip=True)
        before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        first = dataset[0]["images"]
        list(EpochShuffleSampler(dataset))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
        assert torch.equal(dataset[0]["images"], first)

    def test_resuming_in_an_epoch_with_accelerate(self):
        """The loader that Accelerate prepares, skipped ahead, continues the unbroken one bit by bit."""
        images = from_images([noise(index, (20, 24)) for index in range(10)], list(range(10)))

        def prepare():
            dataset = ImageDataset(images, 16, random_flip=True, seed=1)
            loader = torch.utils.data.DataLoader(dataset, batch_size=2, sampler=EpochShuffleSampler(dataset))
            return Accelerator(cpu=True).prepare(loader)

        loader, unbroken = prepare(), []
        for epoch in range(3):
            loader.set_epoch(epoch)
            unbroken += list(loader)
        loader = prepare()
        loader.set_epoch(1)
        resumed = list(skip_first_batches(loader, 3))
        loader.set_epoch(2)
        resumed += list(loader)
        assert len(resumed) == 7
        for a, b in zip(unbroken[8:], resumed, strict=True):
            assert torch.equal(a["images"], b["images"])
            assert torch.equal(a["class_labels"], b["class_labels"])

    def test_two_processes_share_the_examples_of_each_epoch(self):
        """Accelerate shards the loader and tells each copy the epoch: together they see every example once, augmented
        as a single process would."""
        first, second = run_distributed(sums_of_two_epochs)
        alone = sums_of_two_epochs()
        for epoch in (0, 1):
            assert not set(first[epoch]) & set(second[epoch])
            assert {**first[epoch], **second[epoch]} == pytest.approx(alone[epoch], rel=1e-12)  # sums of 768 numbers
        assert alone[0] != alone[1]

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_a_file_that_vanishes_is_replaced_by_the_next_readable_one(self, tmp_path, num_workers):
        folder = write_folder(tmp_path, {f"{name}.png": noise(index) for index, name in enumerate("abcd")})
        dataset = ImageDataset(load_image_dataset(train_data_dir=folder)[0], 16)
        expected = [dataset[index]["images"] for index in (0, 3, 3, 3)]
        os.remove(tmp_path / "b.png")
        (tmp_path / "c.png").write_bytes(b"overwritten")
        # A file, since workers are processes and what they log is out of reach of `caplog`.
        handler = logging.FileHandler(tmp_path / "log.txt")
        logger = logging.getLogger("diffusers_adm.data.images")
        logger.addHandler(handler)
        try:
            for _ in range(5):
                loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=num_workers)
                for example, image in zip(loader, expected, strict=True):
                    assert torch.equal(example["images"], image)
        finally:
            logger.removeHandler(handler)
            handler.close()
        log = (tmp_path / "log.txt").read_text()
        # Five epochs; c.png is met from the place of b.png as well as from its own, maybe by both workers at once.
        assert log.count("b.png became missing") == 1
        assert 1 <= log.count("c.png became unreadable") <= max(1, num_workers)

    def test_the_last_example_wraps_around(self, tmp_path):
        folder = write_folder(tmp_path, {"a.png": noise(0), "b.png": noise(1)})
        dataset = ImageDataset(load_image_dataset(train_data_dir=folder)[0], 16)
        os.remove(tmp_path / "b.png")
        assert torch.equal(dataset[1]["images"], dataset[0]["images"])
        os.remove(tmp_path / "a.png")
        with pytest.raises(RuntimeError, match="2 examples in a row, from .*b.png on, became unreadable"):
            dataset[1]

    def test_errors(self):
        images = from_images([noise(0)])
        with pytest.raises(IndexError):
            ImageDataset(images, 16)[1]
        assert len(list(ImageDataset(images, 16))) == 1


class TestDataLoader:
    def labels_of_an_epoch(self, **data_args):
        labels = [0] * 12 + [1] * 3 + [2]
        images = from_images([noise(i) for i in range(16)], labels)
        data_args = DataArguments(data_files=["a.parquet"], label_column="label", **data_args)
        loader = build_dataloader(ImageDataset(images, 16), data_args, TrainingArguments(train_batch_size=5))
        batches = [batch["class_labels"].tolist() for batch in loader]
        assert [len(batch) for batch in batches] == [5, 5, 5]  # the last image fills no batch
        return np.bincount(np.concatenate(batches), minlength=3)

    def test_classes_as_often_as_they_are_there_or_equally_often(self):
        assert self.labels_of_an_epoch().max() >= 11
        assert self.labels_of_an_epoch(class_balanced=True).max() <= 6  # 16 draws of 3 classes, one of them dropped

    def test_equally_often_needs_classes(self):
        with pytest.raises(ValueError, match="without `label_column`"):
            DataArguments(data_files=["a.parquet"], class_balanced=True)


# Files beside the images


def save_pictures(root, *names):
    write_folder(root, {name: noise(0) for name in names})


def write_metadata(path, *names):
    path.write_text("".join(json.dumps({"file_name": name, "text": f"of {name}"}) + "\n" for name in names))


class TestMetadata:
    def test_images_that_it_does_not_list(self, tmp_path, caplog):
        save_pictures(tmp_path, "a.png", "b.png", "more/c.png", "more/d.png")
        write_metadata(tmp_path / "metadata.jsonl", "a.png", "more/c.png")
        (tmp_path / "notes.txt").write_text("Not a caption.")
        dataset, _ = load_image_dataset(train_data_dir=str(tmp_path), caption_column="text")
        assert dataset["caption"][:] == ["of a.png", "of more/c.png"]
        assert "2 of 4 images" in caplog.text
        assert "are not listed in metadata.jsonl and are skipped: b.png, more/d.png." in caplog.text
        assert "Add them to it" in caplog.text
        assert "not images are skipped: 1 x .txt" in caplog.text

    def test_nothing_is_said_where_all_are_listed(self, tmp_path, caplog):
        save_pictures(tmp_path, "a.png", "more/b.png")
        write_metadata(tmp_path / "metadata.jsonl", "a.png")
        write_metadata(tmp_path / "more" / "metadata.jsonl", "b.png")
        dataset, _ = load_image_dataset(train_data_dir=str(tmp_path), caption_column="text")
        assert sorted(dataset["caption"][:]) == ["of a.png", "of b.png"]
        assert not caplog.records

    def test_files_that_it_lists_and_that_are_not_there(self, tmp_path, caplog):
        save_pictures(tmp_path, "a.png")
        write_metadata(tmp_path / "metadata.jsonl", "a.png", "gone.png")
        dataset, _ = load_image_dataset(train_data_dir=str(tmp_path))
        dataset, skipped = check_images(dataset, 8)
        assert len(dataset) == 1
        assert [Path(name).name for name in skipped[MISSING]] == ["gone.png"]

    @pytest.mark.parametrize("second", ["metadata.csv", "more/metadata.csv"])
    def test_of_two_kinds(self, second, tmp_path):
        save_pictures(tmp_path, "a.png", "more/b.png")
        write_metadata(tmp_path / "metadata.jsonl", "a.png")
        (tmp_path / second).write_text("file_name,text\nb.png,b\n")
        with pytest.raises(ValueError, match="keep metadata of one kind only") as caught:
            load_image_dataset(train_data_dir=str(tmp_path))
        assert "metadata.jsonl" in str(caught.value)
        assert second in str(caught.value)

    @pytest.mark.parametrize("line", ['{"name": "a.png"}', "{"])
    def test_that_cannot_be_read(self, line, tmp_path):
        save_pictures(tmp_path, "a.png")
        (tmp_path / "metadata.jsonl").write_text(f"{line}\n")
        with pytest.raises(ValueError, match="`train_data_dir` .* cannot be read with its metadata.jsonl: "):
            load_image_dataset(train_data_dir=str(tmp_path))

    def test_beside_the_folders_of_splits(self, tmp_path, caplog):
        save_pictures(tmp_path, "train/a.png", "test/b.png")
        write_metadata(tmp_path / "metadata.jsonl", "train/a.png")
        load_image_dataset(train_data_dir=str(tmp_path))
        assert "metadata.jsonl next to it is not read" in caplog.text


class TestCaptionFiles:
    def test_are_a_column(self, tmp_path, caplog):
        save_pictures(tmp_path, "cats/a.png", "cats/b.JPG", "c.png")
        for name, text in (
            ("cats/a.txt", "\ufeffA cat.\n"),
            ("cats/b.txt", "Another c\u00e4t."),
            ("notes.txt", "No caption."),
        ):
            (tmp_path / name).write_text(text, encoding="utf-8")
        dataset, id2label = load_image_dataset(
            train_data_dir=str(tmp_path), caption_column="text", label_column="label"
        )
        captions = {Path(row["image"]["path"]).name: row["caption"] for row in dataset}
        assert captions == {"a.png": "A cat.", "b.JPG": "Another c\u00e4t.", "c.png": ""}
        assert id2label == {0: "cats"}
        assert "1 of 3 images" in caplog.text
        assert "have no .txt file next to them: c.png" in caplog.text
        assert "not images are skipped: 1 x .txt" in caplog.text

    def test_that_nobody_asked_for_are_told(self, tmp_path, caplog):
        save_pictures(tmp_path, "a.png", "b.png")
        (tmp_path / "a.txt").write_bytes(b"no caption: \xff")
        dataset, _ = load_image_dataset(train_data_dir=str(tmp_path))
        assert dataset.column_names == ["image", "row"]
        assert "1 of 2 images" in caplog.text
        assert "have a .txt file next to them, which is not read." in caplog.text
        assert "`caption_column` `text`" in caplog.text
        assert "are not images" not in caplog.text

    def test_changed_ones_are_read_again(self, tmp_path):
        save_pictures(tmp_path, "a.png")
        for text in ("A cat.", "A large dog."):
            (tmp_path / "a.txt").write_text(text)
            dataset, _ = load_image_dataset(train_data_dir=str(tmp_path), caption_column="text")
            assert dataset["caption"][:] == [text]

    def test_a_tokenizer_is_trained_on_them(self, tmp_path, capsys):
        save_pictures(tmp_path / "images", "a.png", "b.png")
        (tmp_path / "images" / "a.txt").write_text("A red cat on a mat.")
        arguments = {"train_data_dir": tmp_path / "images", "vocab_size": 64, "output_dir": tmp_path / "tokenizer"}
        tokenizer.main(flags(**arguments))
        assert "tokens from 2 captions" in capsys.readouterr().out

    def test_that_are_no_text(self, tmp_path):
        save_pictures(tmp_path, "a.png")
        (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ValueError, match="a.txt is not UTF-8"):
            load_image_dataset(train_data_dir=str(tmp_path), caption_column="text")


def test_more_samples_than_there_are(caplog):
    caplog.set_level("INFO")
    dataset, _ = load_image_dataset(data_files=EMOJI, max_train_samples=5000)
    assert f"`max_train_samples` is 5000, but there are {len(dataset)} images: all are taken." in caplog.text
