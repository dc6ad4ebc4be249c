"""The format of a dataset: round trips of every kind of data, and data that cannot be used together."""

import io

import datasets
import imagecodecs
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tifffile
import torch
from PIL import Image

from diffusers_adm.conditioning.image_format import ImageFormat
from diffusers_adm.data.checks import check_images
from diffusers_adm.data.columns import load_image_dataset
from diffusers_adm.data.decoding import decode_image
from diffusers_adm.data.formats import FormatRequest, find_image_format
from diffusers_adm.data.images import ImageDataset
from diffusers_adm.data.pixels import UnusableImageError


SIZE = (12, 20)  # height, width


def integers(seed, channels, high, low=0, dtype=np.uint16):
    """Values of which the first two are the lowest and the highest."""
    values = np.random.default_rng(seed).integers(low, high, (*SIZE, channels), endpoint=True)
    values[0, :2] = [[low], [high]]
    return values.astype(dtype)


def floats(seed, channels, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal((*SIZE, channels)).astype(dtype)


def save_png(path, values):
    path.write_bytes(imagecodecs.png_encode(values[..., 0] if values.shape[-1] == 1 else values))


def save_tiff(path, values):
    photometric = "rgb" if values.shape[-1] == 3 else "minisblack"
    if values.shape[-1] == 1:
        tifffile.imwrite(path, values[..., 0], photometric=photometric)
    else:
        tifffile.imwrite(path, values, photometric=photometric, planarconfig="contig")


def save_npz(path, values):
    np.savez(path, values=np.moveaxis(values, -1, 0))  # channels first


SAVE = {"png": save_png, "tif": save_tiff, "npy": np.save, "npz": save_npz}


def load(folder, **files):
    """The dataset of a folder with these arrays, by names such as `a_png`."""
    for name, values in files.items():
        stem, suffix = name.rsplit("_", 1)
        SAVE[suffix](folder / f"{stem}.{suffix}", values)
    return load_image_dataset(train_data_dir=str(folder), cache_dir=str(folder / ".cache"))[0]


def find(dataset, **request):
    return find_image_format(dataset, FormatRequest(**request))


def tensors(dataset, image_format, size=SIZE, **options):
    dataset, skipped = check_images(dataset, size, image_format=image_format)
    assert not skipped
    return [example["images"] for example in ImageDataset(dataset, size, image_format=image_format, **options)]


def check_round_trip(dataset, image_format, arrays):
    """Exact for levels, 1e-6 of the range for floating point numbers."""
    low, high = image_format.value_range
    samples = tensors(dataset, image_format)
    for sample, values in zip(samples, arrays, strict=True):
        assert (sample.dtype, sample.shape) == (torch.float32, (values.shape[-1], *SIZE))
        assert sample.abs().max() <= 1
        found = image_format.to_values(sample).permute(1, 2, 0).double().numpy()
        tolerance = 0 if image_format.num_levels else 1e-6 * (high - low)
        np.testing.assert_allclose(found, values.astype(np.float64), rtol=0, atol=tolerance)


class TestRoundTrip:
    @pytest.mark.parametrize(
        "suffix,channels,dtype,high",
        [
            ("png", 1, np.uint8, 255),
            ("png", 3, np.uint8, 255),
            ("png", 1, np.uint16, 65535),
            ("png", 3, np.uint16, 65535),
            ("tif", 1, np.uint16, 65535),
            ("tif", 3, np.uint16, 65535),
            ("tif", 5, np.uint8, 255),
            ("tif", 5, np.uint16, 65535),
            ("npy", 2, np.uint16, 65535),
            ("npz", 13, np.uint8, 255),
        ],
    )
    def test_whole_range_of_unsigned_integers(self, tmp_path, suffix, channels, dtype, high):
        arrays = [integers(seed, channels, high, dtype=dtype) for seed in range(2)]
        dataset = load(tmp_path, **{f"{name}_{suffix}": values for name, values in zip("ab", arrays, strict=True)})
        image_format = find(dataset, channels=channels)
        mode = {1: "L", 3: "RGB"}.get(channels, "array")
        assert image_format == ImageFormat(mode, channels, (0, high), high + 1)
        check_round_trip(dataset, image_format, arrays)

    @pytest.mark.parametrize("mode,channels", [("LA", 2), ("RGBA", 4)])
    @pytest.mark.parametrize("dtype,high", [(np.uint8, 255), (np.uint16, 65535)])
    def test_alpha_is_kept_if_asked_for(self, tmp_path, mode, channels, dtype, high):
        arrays = [integers(seed, channels, high, dtype=dtype) for seed in range(2)]
        dataset = load(tmp_path, a_png=arrays[0], b_png=arrays[1])
        image_format = find(dataset, channels=channels, image_mode=mode)
        assert image_format == ImageFormat(mode, channels, (0, high), high + 1)
        check_round_trip(dataset, image_format, arrays)

    @pytest.mark.parametrize(
        "suffix,dtype,low,high",
        [
            ("tif", np.int16, -1024, 3071),
            ("npy", np.int16, -1024, 3071),
            ("tif", np.int32, -70000, -5000),
            ("npy", np.int64, 7, 9),
            ("npy", np.uint8, 3, 9),
        ],
    )
    def test_range_of_integers(self, tmp_path, suffix, dtype, low, high):
        arrays = [integers(seed, 2, high, low, dtype) for seed in range(2)]
        dataset = load(tmp_path, **{f"a_{suffix}": arrays[0], f"b_{suffix}": arrays[1]})
        for value_range in ((low, high), "auto"):
            image_format = find(dataset, channels=2, value_range=value_range)
            assert image_format == ImageFormat("array", 2, (low, high), high - low + 1)
        check_round_trip(dataset, image_format, arrays)

    @pytest.mark.parametrize("suffix", ["tif", "npy", "npz"])
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize("channels", [1, 3, 5])
    def test_floating_point_numbers(self, tmp_path, suffix, dtype, channels):
        arrays = [floats(seed, channels, dtype) + 100 for seed in range(2)]
        dataset = load(tmp_path, **{f"a_{suffix}": arrays[0], f"b_{suffix}": arrays[1]})
        image_format = find(dataset, channels=channels, value_range="auto")
        assert image_format.value_range == (np.min(arrays), np.max(arrays))
        assert image_format.num_levels is None
        check_round_trip(dataset, image_format, arrays)
        assert find(dataset, channels=channels, value_range=(90, 110)).value_range == (90, 110)

    def test_booleans_are_two_levels(self, tmp_path):
        arrays = [integers(seed, 1, 1).astype(bool) for seed in range(2)]
        dataset = load(tmp_path, a_npy=arrays[0], b_npy=arrays[1])
        image_format = find(dataset, channels=1)
        assert image_format == ImageFormat("L", 1, (0, 1), 2)
        check_round_trip(dataset, image_format, arrays)
        assert set(np.unique(tensors(dataset, image_format))) == {-1, 1}

    @pytest.mark.parametrize("feature", ["lists", "Array2D", "Array3D"])
    @pytest.mark.parametrize("dtype", ["uint16", "float32"])
    def test_array_columns(self, tmp_path, feature, dtype):
        channels = 1 if feature == "Array2D" else 4
        arrays = [integers(seed, channels, 4000, dtype=dtype) for seed in range(3)]
        columns = {"scan": [values[..., 0] if channels == 1 else values for values in arrays], "kind": ["a", "b", "a"]}
        path = str(tmp_path / "data.parquet")
        if feature == "lists":
            type_ = pyarrow.list_(pyarrow.list_(pyarrow.list_(pyarrow.from_numpy_dtype(np.dtype(dtype)))))
            scans = pyarrow.array([values.tolist() for values in columns["scan"]], type=type_)
            pyarrow.parquet.write_table(pyarrow.table({"scan": scans, "kind": columns["kind"]}), path)
        else:
            shape = columns["scan"][0].shape
            features = {"scan": getattr(datasets, feature)(shape, dtype), "kind": datasets.Value("string")}
            datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(path)
        dataset, id2label = load_image_dataset(
            data_files=path, image_column="scan", label_column="kind", cache_dir=str(tmp_path)
        )
        assert id2label == {0: "a", 1: "b"}
        image_format = find(dataset, channels=channels, value_range=(0, 4000))
        assert image_format.num_levels == (4001 if dtype == "uint16" else None)
        check_round_trip(dataset, image_format, arrays)

    def test_nested_lists_of_grey(self, tmp_path):
        pyarrow.parquet.write_table(pyarrow.table({"image": [[[0, 7], [3, 5]], None]}), tmp_path / "data.parquet")
        dataset, _ = load_image_dataset(data_files=str(tmp_path / "data.parquet"), cache_dir=str(tmp_path))
        image_format = find(dataset, value_range="auto")
        assert image_format == ImageFormat("L", 1, (0, 7), 8)
        dataset, skipped = check_images(dataset, 2, image_format=image_format)
        assert skipped == {"missing": ["row 1"]}
        sample = ImageDataset(dataset, 2, image_format=image_format)[0]["images"]
        assert image_format.to_values(sample).tolist() == [[[0, 7], [3, 5]]]

    def test_arrays_that_cannot_be_written_to(self, recwarn):
        pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
        features = datasets.Features({"image": datasets.Image(decode=False)})
        dataset = datasets.Dataset.from_dict({"image": [Image.fromarray(pixels)]}, features=features)
        image_format = ImageFormat("L", 1, (0, 99), 100)
        (example,) = ImageDataset(dataset, 8, image_format=image_format)
        assert torch.equal(image_format.to_values(example["images"])[0], torch.from_numpy(pixels).float())
        assert not [warning for warning in recwarn if "writable" in str(warning.message)]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_samples_of_half_precision(self, dtype):
        # The highest of 16 bits is infinite in float16.
        values = ImageFormat("L", 1, (0, 65535), 65536).to_values(torch.tensor([-1, 0.25, 1], dtype=dtype))
        assert values.dtype == torch.float32
        assert values.tolist() == [0, 40959, 65535]


class TestConversion:
    def test_grey_becomes_colour_for_a_network_of_three_channels(self, tmp_path, caplog):
        grey, colour = integers(0, 1, 255, dtype=np.uint8), integers(1, 3, 255, dtype=np.uint8)
        dataset = load(tmp_path, a_png=grey, b_png=colour, c_npy=grey, d_npy=colour)
        for channels in (3, None):
            caplog.clear()
            with caplog.at_level("INFO"):
                image_format = find(dataset, channels=channels)
            assert image_format == ImageFormat()
            assert "2 of 4 images are converted from L to RGB: " in caplog.text
            assert "c.npy" in caplog.text
            check_round_trip(dataset, image_format, [grey.repeat(3, axis=-1), colour] * 2)

    def test_colour_becomes_grey_as_in_pillow(self, tmp_path):
        colour = integers(0, 3, 255, dtype=np.uint8)
        expected = np.asarray(Image.fromarray(colour).convert("L"))[..., None]
        dataset = load(tmp_path, a_png=colour)
        check_round_trip(dataset, find(dataset, channels=1, image_mode="L"), [expected])

    def test_colour_becomes_grey_at_any_depth(self):
        """65536 levels are 257 for each of 256; what is rounded to these must be Pillow's."""
        colour = integers(0, 3, 255, dtype=np.uint8)
        deep = decode_image(
            {"bytes": imagecodecs.png_encode(colour.astype(np.uint16) * 257), "path": None},
            ImageFormat("L", 1, (0, 65535), 65536),
        )
        exact = colour @ [0.299, 0.587, 0.114]
        np.testing.assert_allclose(deep[..., 0] / 257, exact, rtol=0, atol=1 / 257 + 255 * 2e-5)
        rounded = np.asarray(Image.fromarray(colour).convert("L"))
        assert np.abs(np.round(deep[..., 0] / 257) - rounded).max() <= 1

    @pytest.mark.parametrize("background", [(255, 255, 255), (0, 100, 200)])
    def test_alpha_is_laid_on_the_background_at_any_depth(self, background):
        values = integers(0, 4, 65535)
        image = {"bytes": imagecodecs.png_encode(values), "path": None}
        alpha = values[..., 3:] / 65535
        exact = values[..., :3] * alpha + np.array(background) * 257 * (1 - alpha)
        found = decode_image(image, ImageFormat("RGB", 3, (0, 65535), 65536), background)
        np.testing.assert_allclose(found, exact, rtol=0, atol=0.5001)
        eight = {"bytes": imagecodecs.png_encode((values / 257).round().astype(np.uint8)), "path": None}
        np.testing.assert_allclose(np.asarray(decode_image(eight, ImageFormat(), background)), exact / 257, atol=1.5)
        # In a range of 12 bits, white is 4095.
        values[..., :3] //= 16
        found = decode_image(
            {"bytes": imagecodecs.png_encode(values), "path": None}, ImageFormat("RGB", 3, (0, 4095), 4096)
        )
        exact = values[..., :3] * alpha + 4095 * (1 - alpha)
        np.testing.assert_allclose(found, exact, rtol=0, atol=0.5001)

    def test_images_without_alpha_are_opaque(self, tmp_path):
        grey = integers(0, 1, 65535)
        dataset = load(tmp_path, a_png=grey)
        expected = np.concatenate([grey, grey, grey, np.full_like(grey, 65535)], axis=-1)
        check_round_trip(dataset, find(dataset, image_mode="RGBA"), [expected])

    @pytest.mark.parametrize("write", ["png", "tif", "npy"])
    @pytest.mark.parametrize("value_range", ["auto", (0, 4095), (-100, 70000)])
    def test_alpha_has_the_range_of_its_type(self, tmp_path, caplog, write, value_range):
        """12 bits of colour in 16: opaque is 65535 in the file, and the upper end of the range in data."""
        values = integers(0, 4, 4095)
        alpha = np.zeros(SIZE, dtype=np.uint16)
        alpha[:, 5:], alpha[:, 9:] = 65535 // 3, 65535
        values[..., 3] = alpha
        if write == "tif":
            tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", extrasamples=["unassalpha"])
            dataset = load(tmp_path)
        else:
            dataset = load(tmp_path, **{f"a_{write}": values})
        if value_range == (-100, 70000):
            with pytest.raises(ValueError, match="70101 levels, more than 65536"):
                find(dataset, image_mode="RGBA", value_range=value_range)
            image_format = ImageFormat("RGBA", 4, value_range, 65536)
        else:
            image_format = find(dataset, image_mode="RGBA", value_range=value_range)
            assert image_format == ImageFormat("RGBA", 4, (0, 4095), 4096)
            assert not [record for record in caplog.records if record.levelname == "WARNING"]
            expected = values.copy()
            expected[..., 3] = np.round(alpha / 65535 * 4095)
            check_round_trip(dataset, image_format, [expected])
        found = decode_image(dataset[0]["image"], image_format)
        low, high = image_format.value_range
        np.testing.assert_array_equal(found[..., :3], values[..., :3])
        assert found[0, [0, 5, 9], 3].tolist() == [low, round(low + (high - low) / 3), high]

    def test_the_share_of_the_range_is_that_of_colours(self, tmp_path, caplog):
        values = integers(0, 4, 4000)
        values[..., 3] = 65535
        image_format = find(load(tmp_path, a_png=values), image_mode="RGBA")
        assert image_format.value_range == (0, 65535)
        assert "The images range from 0 to 4000 and fill 6% of 0 to 65535" in caplog.text

    def test_alpha_of_floating_point_numbers(self, tmp_path):
        values = floats(0, 4) * 10
        values[..., 3] = np.linspace(0, 1, SIZE[1])
        dataset = load(tmp_path, a_npy=values)
        tifffile.imwrite(tmp_path / "b.tif", values, photometric="rgb", extrasamples=["unassalpha"])
        dataset = load(tmp_path)
        image_format = find(dataset, image_mode="RGBA", value_range=(-60, 60))
        expected = values.copy()
        expected[..., 3] = values[..., 3] * 120 - 60
        check_round_trip(dataset, image_format, [expected] * 2)
        low, high = find(dataset, image_mode="RGBA", value_range="auto").value_range
        assert (low, high) == (values[..., :3].min(), values[..., :3].max())

    @pytest.mark.parametrize("mode", ["RGB", "RGBA"])
    def test_alpha_outside_of_its_range(self, tmp_path, mode):
        values = floats(0, 4)
        values[..., 3] = np.linspace(0, 2, SIZE[1])
        path = tmp_path / "a.tif"
        tifffile.imwrite(path, values, photometric="rgb", extrasamples=["unassalpha"])
        with pytest.raises(ValueError, match=r"The alpha of 1 of 1 images .*a.tif \(from 0 to 2, outside of 0 to 1\)"):
            find(load(tmp_path), image_mode=mode, value_range="auto")
        with pytest.raises(UnusableImageError, match="alpha from 0 to 2, outside of 0 to 1"):
            decode_image({"bytes": None, "path": str(path)}, ImageFormat(mode, len(mode), (-9, 9), None))

    def test_alpha_of_wide_integers_is_in_the_value_range(self, tmp_path):
        """Nested lists are int64, whatever they hold."""
        values = integers(0, 4, 255, dtype=np.int64)
        dataset = load(tmp_path, a_npy=values)
        check_round_trip(dataset, find(dataset, image_mode="RGBA", value_range=(0, 255)), [values])

    @pytest.mark.parametrize("low, high", [(0, 4095), (-5, 300), (0, 1)])
    def test_images_without_alpha_are_opaque_in_any_range(self, tmp_path, low, high):
        grey = integers(0, 1, 1, dtype=np.uint8)
        dataset = load(tmp_path, a_png=grey)
        image_format = find(dataset, image_mode="LA", value_range=(low, high))
        expected = np.concatenate([grey.astype(int), np.full(grey.shape, high)], axis=-1)
        check_round_trip(dataset, image_format, [expected])

    def test_alpha_is_a_channel_of_arrays_with_a_warning(self, tmp_path, caplog):
        values = integers(0, 4, 255, dtype=np.uint8)
        dataset = load(tmp_path, a_png=values)
        image_format = find(dataset, channels=4)
        assert image_format.mode == "array"
        assert "The alpha of RGBA images is taken for a channel like the others" in caplog.text
        assert "`--image_mode RGBA`" in caplog.text
        check_round_trip(dataset, image_format, [values])

    def test_without_a_network_the_images_decide(self, tmp_path):
        for name, values, expected in (
            ("grey", integers(0, 1, 255, dtype=np.uint8), ImageFormat("L", 1)),
            ("colour", integers(0, 3, 255, dtype=np.uint8), ImageFormat("RGB", 3)),
            ("alpha", integers(0, 4, 255, dtype=np.uint8), ImageFormat("RGB", 3)),
        ):
            (tmp_path / name).mkdir()
            assert find(load(tmp_path / name, a_png=values)) == expected
        (tmp_path / "bands").mkdir()
        assert find(load(tmp_path / "bands", a_tif=integers(0, 5, 255, dtype=np.uint8))) == ImageFormat("array", 5)


class TestRange:
    def test_twelve_bits_in_sixteen(self, tmp_path, caplog):
        """Without a word, they would end in a sixteenth of the range."""
        values = integers(0, 1, 4000, low=16)
        dataset = load(tmp_path, a_png=values)
        assert find(dataset, channels=1).value_range == (0, 65535)
        assert "The images range from 16 to 4000 and fill 6% of 0 to 65535" in caplog.text
        assert "pass `--value_range auto` or `--value_range 0 4095`" in caplog.text
        caplog.clear()
        image_format = find(dataset, channels=1, value_range=[0, 4095])  # as from a command line
        assert (image_format.value_range, image_format.num_levels) == ((0, 4095), 4096)
        check_round_trip(dataset, image_format, [values])
        assert not [record for record in caplog.records if record.levelname == "WARNING"]

    @pytest.mark.parametrize(
        "low, high, share", [(61441, 65535, "6%"), (40000, 40099, "0.2%"), (40000, 40010, "0.02%"), (0, 25000, "38%")]
    )
    def test_a_range_that_is_no_better_is_not_advised(self, tmp_path, caplog, low, high, share):
        dataset = load(tmp_path, a_png=integers(0, 1, high, low=low))
        find(dataset, channels=1)
        advice = "`--value_range auto`" + " or `--value_range 0 32767`" * (high == 25000)
        assert f"range from {low} to {high} and fill {share} of 0 to 65535: pass {advice}." in caplog.text

    def test_auto_is_measured_over_all_images_and_logged(self, tmp_path, caplog):
        dataset = load(tmp_path, a_png=integers(0, 1, 4000, low=16), b_png=integers(1, 1, 900, low=3))
        with caplog.at_level("INFO"):
            image_format = find(dataset, channels=1, value_range="auto")
        assert image_format == ImageFormat("L", 1, (3, 4000), 3998)
        assert "`--value_range auto`: the images range from 3 to 4000." in caplog.text

    def test_eight_bits_are_measured_only_if_asked(self, tmp_path):
        dataset = load(tmp_path, a_png=integers(0, 1, 200, low=5, dtype=np.uint8))
        assert find(dataset, channels=1) == ImageFormat("L", 1)
        assert find(dataset, channels=1, value_range="auto") == ImageFormat("L", 1, (5, 200), 196)

    @pytest.mark.parametrize("suffix", ["png", "npy"])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_zeros_and_ones_of_eight_bits(self, tmp_path, caplog, suffix, channels):
        """Masks as programs for segmentation save them: within 1 / 255 of the range without a word."""
        arrays = [integers(seed, channels, 1, dtype=np.uint8) for seed in range(2)]
        dataset = load(tmp_path, **{f"{name}_{suffix}": values for name, values in zip("ab", arrays, strict=True)})
        check_images(dataset, SIZE, image_format=find(dataset, channels=channels))
        assert "The images range from 0 to 1 and fill 0.4% of 0 to 255" in caplog.text
        assert "pass `--value_range auto` or `--value_range 0 1`." in caplog.text
        caplog.clear()
        check_images(dataset, SIZE, image_format=find(dataset, channels=channels))  # from the cache
        assert "pass `--value_range auto` or `--value_range 0 1`." in caplog.text
        caplog.clear()
        check_images(dataset, SIZE, image_format=find(dataset, channels=channels, value_range="auto"))
        check_images(dataset, SIZE, image_format=find(dataset, channels=channels), range_argument=None)
        assert not [record for record in caplog.records if record.levelname == "WARNING"]

    @pytest.mark.parametrize("mode, channels, high, warns", [("array", 5, 12, True), ("L", 1, 13, False)])
    def test_few_values_of_eight_bits(self, tmp_path, caplog, mode, channels, high, warns):
        dataset = load(tmp_path, a_npy=integers(0, channels, high, dtype=np.uint8))
        check_images(dataset, SIZE, image_format=find(dataset, image_mode=mode))
        assert (f"from 0 to {high} and fill 5% of 0 to 255" in caplog.text) == warns

    def test_opaque_alpha_does_not_hide_few_values(self, tmp_path, caplog):
        values = integers(0, 4, 1, dtype=np.uint8)
        values[..., 3] = 255
        dataset = load(tmp_path, a_png=values)
        check_images(dataset, SIZE, image_format=find(dataset, image_mode="RGBA"))
        assert "The images range from 0 to 1" in caplog.text

    def test_headers_are_enough_for_eight_bits(self, tmp_path):
        save_png(tmp_path / "a.png", integers(0, 3, 255, dtype=np.uint8))
        content = (tmp_path / "a.png").read_bytes()
        (tmp_path / "a.png").write_bytes(content[:60])
        assert find(load(tmp_path), channels=3) == ImageFormat()

    def test_the_survey_is_cached(self, tmp_path):
        dataset = load(tmp_path, a_png=integers(0, 1, 4000), b_png=integers(1, 1, 900))
        find(dataset, channels=1, value_range="auto")

        def cached():
            return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("cache-*.arrow")}

        files = cached()
        assert len(files) == 2
        find(dataset, channels=1, value_range="auto")
        assert cached() == files

    @pytest.mark.parametrize("num_proc", [None, 2])
    def test_outside(self, tmp_path, num_proc):
        files = {f"{name}_png": integers(seed, 1, 1000 * seed) for seed, name in enumerate("abcdef", start=1)}
        dataset = load(tmp_path, **files)
        with pytest.raises(ValueError, match="is 0 to 1500, but 5 of 6 images have values outside of it: ") as caught:
            find_image_format(dataset, FormatRequest(channels=1, value_range=(0, 1500)), num_proc=num_proc)
        message = str(caught.value)
        assert "b.png (0 to 2000)" in message
        assert "d.png (0 to 4000) and 2 more. All images range from 0 to 6000" in message

    def test_floating_point_numbers_need_a_range(self, tmp_path):
        dataset = load(tmp_path, a_npy=floats(0, 1) * 0 + np.linspace(-2.5, 7, 20, dtype=np.float32)[:, None])
        with pytest.raises(
            ValueError, match=r"\(float32\), whose range is not known.*`--value_range LOW HIGH`"
        ) as error:
            find(dataset, channels=1)
        assert "`--value_range auto` for -2.5 to 7" in str(error.value)

    def test_many_levels(self, tmp_path):
        dataset = load(tmp_path, a_npy=integers(0, 1, 70000, dtype=np.int32))
        with pytest.raises(
            ValueError, match="int32, whose whole range has more than 65536 levels.*auto. for 0 to 70000"
        ):
            find(dataset)
        with pytest.raises(
            ValueError, match="from 0 to 70000 are 70001 levels, more than 65536.*convert the images to fl"
        ):
            find(dataset, value_range="auto")

    def test_integers_need_whole_numbers(self, tmp_path):
        dataset = load(tmp_path, a_png=integers(0, 1, 100))
        with pytest.raises(
            ValueError, match="is -0.5 to 100.5, but the images are integers .uint16.. Pass whole numbers"
        ):
            find(dataset, value_range=(-0.5, 100.5))

    def test_one_value(self, tmp_path):
        dataset = load(tmp_path, a_npy=np.full((*SIZE, 1), 3.0))
        with pytest.raises(
            ValueError, match="All values of the images are 3, so that `--value_range auto` finds no range"
        ):
            find(dataset, value_range="auto")


class TestPretrained:
    known = ImageFormat("L", 1, (0, 4095), 4096)

    def test_wins_where_nothing_is_said(self, tmp_path):
        values = integers(0, 1, 1000)
        dataset = load(tmp_path, a_png=values)
        assert find(dataset, channels=1, known=self.known) == self.known
        assert find(load(tmp_path), known=ImageFormat("L", 1, (-10, 5000), None)).num_levels is None
        check_round_trip(dataset, self.known, [values])

    def test_a_range_that_is_said_wins_with_a_warning(self, tmp_path, caplog):
        dataset = load(tmp_path, a_png=integers(0, 1, 1000))
        assert find(dataset, value_range=(0, 1023), known=self.known) == ImageFormat("L", 1, (0, 1023), 1024)
        assert (
            "`--value_range` is 0 to 1023, but the model was trained on grey images from 0 to 4095 (4096 levels): the "
            "same value means something else to it."
        ) in caplog.text
        assert "pretrained" not in caplog.text  # evaluations, where nobody trains, say the same

    def test_contradictions_with_the_data(self, tmp_path):
        for name, values, message in (
            (
                "deep",
                integers(0, 1, 5000),
                "The range of the model, trained on grey images .* 1 of 1 images have",
            ),
            (
                "eight",
                integers(0, 1, 255, dtype=np.uint8),
                "The images are uint8, from 0 to 255, but the model was trained",
            ),
            (
                "float",
                floats(0, 1),
                "are floating point numbers .float32. from .*, but the model was trained",
            ),
        ):
            (tmp_path / name).mkdir()
            dataset = load(tmp_path / name, **{"a_npy": values})
            with pytest.raises(ValueError, match=message):
                find(dataset, known=self.known)
        colour = load(tmp_path, b_png=integers(0, 3, 255, dtype=np.uint8)).select([0])
        with pytest.raises(ValueError, match="The network has 1 channel.*b.png.*Pass `--image_mode L` to convert"):
            find(colour, known=ImageFormat("L", 1))

    def test_contradictions_with_arguments(self):
        with pytest.raises(ValueError, match="`--image_mode` is array, but the model was trained on grey"):
            FormatRequest(image_mode="array", known=self.known)
        with pytest.raises(ValueError, match="trained on grey images .*, 1 channel.*, but the network has 3"):
            FormatRequest(channels=3, known=self.known)
        with pytest.raises(
            ValueError, match="`--image_mode` RGB has 3 channel.*, but the network has 1. Pass `--image_m"
        ):
            FormatRequest(channels=1, image_mode="RGB")
        with pytest.raises(ValueError, match="trained on RGBA images .* Omit it, or pass `--image_mode RGBA`"):
            FormatRequest(channels=4, image_mode="RGB", known=ImageFormat("RGBA", 4))
        with pytest.raises(ValueError, match="`--image_mode` is 'CMYK'; it must be one of L, LA, RGB"):
            FormatRequest(image_mode="CMYK")
        for value_range in ((1, 1), (0, float("inf")), (float("nan"), 1)):
            with pytest.raises(ValueError, match="pass two numbers, .* the lower one first"):
                FormatRequest(value_range=value_range)
        with pytest.raises(ValueError, match="`--value_range` is .*pass two numbers, .* or auto"):
            FormatRequest(value_range="all")


def test_integers_that_float32_does_not_tell_apart(tmp_path):
    dataset = load(tmp_path, a_npy=np.array([[3 * 10**7, 3 * 10**7 + 1]], np.int32))
    with pytest.raises(ValueError, match="from 30000000 to 30000001 are beyond 16777216.* Subtract an offset"):
        find(dataset, value_range="auto")


class TestRefusals:
    def test_mixed_depths(self, tmp_path):
        dataset = load(tmp_path, a_png=integers(0, 1, 255, dtype=np.uint8), b_png=integers(0, 1, 65535))
        with pytest.raises(
            ValueError, match=r"different types of values. 1 uint8: .*a.png; 1 uint16: .*b.png. Save all"
        ):
            find(dataset, channels=1)

    def test_mixed_channels(self, tmp_path):
        dataset = load(tmp_path, a_npy=floats(0, 5), b_npy=floats(0, 4), c_npy=floats(0, 5))
        with pytest.raises(
            ValueError,
            match="different channels: arrays of 5 channels .float32.: .*c.npy; arrays of 4 channels .*b.npy. Keep",
        ):
            find(dataset, value_range="auto")
        with pytest.raises(ValueError, match="The network has 5 channels, .*: arrays .*Keep images of one kind only"):
            find(dataset, channels=5, value_range="auto")

    def test_other_channels_than_the_network(self, tmp_path):
        dataset = load(tmp_path, a_png=integers(0, 3, 255, dtype=np.uint8))
        with pytest.raises(
            ValueError, match="network has 1 channel, .*: RGB images .*a.png. Pass `--image_mode L` to conv"
        ):
            find(dataset, channels=1)
        with pytest.raises(
            ValueError,
            match="network has 5 channels, .*: RGB images .*a.png. Use a network of 3 channels, or leave "
            "`in_channels` and `out_channels` out of its config",
        ):
            find(dataset, channels=5)
        dataset = load(tmp_path, a_npy=floats(0, 5)).select([0])
        with pytest.raises(
            ValueError,
            match="`--image_mode` is L, but .* arrays of 5 channels.*Leave `--image_mode` out, or pass "
            "`--image_mode array`.$",
        ):
            find(dataset, image_mode="L", value_range="auto")
        for way_out in ({}, {"image_mode": "array"}):
            assert find(dataset, value_range="auto", **way_out).channels == 5
        with pytest.raises(
            ValueError,
            match="`--image_mode` is RGB, .* Use a network of 5 channels without `--image_mode RGB`.$",
        ):
            find(dataset, channels=3, image_mode="RGB", value_range="auto")
        assert find(dataset, channels=5, value_range="auto").channels == 5
        with pytest.raises(ValueError, match="The network has 3 channels, .* Use a network of 5 channels"):
            find(dataset, channels=3, image_mode="array", value_range="auto")

    def test_messages_name_the_arguments_of_the_images(self, tmp_path):
        dataset = load(tmp_path, a_png=integers(0, 3, 255, dtype=np.uint8))
        names = {"mode_argument": None, "range_argument": "--condition_value_range"}
        with pytest.raises(ValueError, match="The network has 1 channel") as error:
            find(dataset, channels=1, **names)
        assert "_mode" not in str(error.value)
        with pytest.raises(ValueError, match="`--condition_value_range` is 0 to 1,.*or `--condition_value_range auto`"):
            find(dataset, channels=3, value_range=(0, 1), **names)

    def test_a_fourth_band_of_unknown_meaning_is_not_dropped(self, tmp_path):
        values = integers(0, 4, 255, dtype=np.uint8)
        tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", extrasamples=["unspecified"])
        dataset = load(tmp_path)
        with pytest.raises(ValueError, match="network has 3 channel.*arrays of 4 channels.*Use a network of 4 channel"):
            find(dataset, channels=3)
        check_round_trip(dataset, find(dataset, channels=4), [values])

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("suffix", ["npy", "tif"])
    def test_values_that_are_not_finite(self, tmp_path, value, suffix):
        bad = floats(0, 5)
        bad[2, 3, :2] = value
        dataset = load(tmp_path, **{f"a_{suffix}": floats(1, 5), f"b_{suffix}": bad})
        for value_range in ("auto", (-100, 100), None):
            with pytest.raises(
                ValueError, match=rf"1 of 2 images hold NaN or infinite values: .*b.{suffix} \(2 values\)"
            ):
                find(dataset, channels=5, value_range=value_range)

    def test_channels_first(self, tmp_path, caplog):
        values = floats(0, 5)
        dataset = load(tmp_path, a_npz=values, b_npz=values)
        with pytest.raises(
            ValueError, match=r"b.npz \(an array of shape \(5, 12, 20\), which looks like \(channels"
        ) as refused:
            find(dataset, value_range="auto")
        assert "or, for images to train on, set `in_channels` in the network's config" in str(refused.value)
        assert str(refused.value).count("looks like") == 1
        assert str(refused.value).startswith("2 of 2 files cannot be used as images: ")
        with caplog.at_level("INFO"):
            image_format = find(dataset, channels=5, value_range="auto")
        assert caplog.text.count("2 of 2 images are arrays of shape (channels, height, width) and are transposed") == 1
        check_round_trip(dataset, image_format, [values, values])
        with pytest.raises(ValueError, match="The network has 4 channel.* arrays of 5 channels"):
            find(dataset, channels=4, value_range="auto")

    def test_files_that_are_no_images(self, tmp_path):
        np.save(tmp_path / "a.npy", np.array([[1, None]], dtype=object), allow_pickle=True)
        np.save(tmp_path / "b.npy", np.zeros((0, 4)))
        np.savez(tmp_path / "c.npz", a=np.zeros((4, 4)), b=np.zeros((4, 4)))
        (tmp_path / "d.ppm").write_bytes(b"P6 2 1 65535\n" + bytes(12))
        with pytest.raises(
            ValueError, match="4 of 4 files cannot be used as images: .*a.npy .an array of Python objects"
        ) as error:
            find(load(tmp_path))
        assert "b.npy (an empty array" in str(error.value)
        assert "c.npz (a .npz file with 2 arrays" in str(error.value)
        assert "and 1 more" in str(error.value)

    def test_unreadable_files_are_left_to_the_check(self, tmp_path):
        dataset = load(tmp_path, a_png=integers(0, 1, 255, dtype=np.uint8))
        (tmp_path / "b.png").write_bytes(b"no image")
        (tmp_path / "c.npy").write_bytes(b"\x93NUMPY\x01\x00damaged")
        dataset = load(tmp_path)
        image_format = find(dataset, channels=1)
        kept, skipped = check_images(dataset, SIZE, image_format=image_format)
        assert len(kept) == 1
        assert len(skipped["unreadable"]) == 2
        only_bad = dataset.select([1, 2])
        with pytest.raises(ValueError, match="None of the 2 images can be used: 2 unreadable"):
            check_images(only_bad, SIZE, image_format=find(only_bad, channels=1))

    def test_files_that_only_have_headers(self, tmp_path):
        load(tmp_path, a_png=integers(0, 1, 65535))
        path = tmp_path / "a.png"
        path.write_bytes(path.read_bytes()[:60])
        with pytest.raises(ValueError, match="None of the 1 images can be decoded: .*a.png"):
            find(load(tmp_path), channels=1)

    def test_ragged_lists(self, tmp_path):
        for name, rows, message in (
            ("ragged", [[[1, 2], [3]]], "Row 0 of `image_column` 'image' of .* holds lists of different lengths"),
            ("null", [[[1, 2], [3, 4]], [[1, None], [3, 4]]], "Row 1 of .* holds 1 missing values"),
        ):
            path = str(tmp_path / f"{name}.parquet")
            pyarrow.parquet.write_table(pyarrow.table({"image": rows}), path)
            with pytest.raises(ValueError, match=message):
                load_image_dataset(data_files=path, cache_dir=str(tmp_path))
        pyarrow.parquet.write_table(pyarrow.table({"image": [[1, 2]]}), tmp_path / "flat.parquet")
        with pytest.raises(ValueError, match="cannot hold images, encoded images, paths of images or arrays"):
            load_image_dataset(data_files=str(tmp_path / "flat.parquet"), cache_dir=str(tmp_path))


def test_values_that_change_after_the_survey_are_replaced(tmp_path, caplog):
    """By the next readable image, as files that become unreadable."""
    good = integers(0, 1, 1000)
    dataset = load(tmp_path, a_png=good, b_png=good)
    image_format = find(dataset, channels=1, value_range=(0, 1000))
    save_png(tmp_path / "a.png", integers(0, 1, 2000))
    sample = ImageDataset(dataset, SIZE, image_format=image_format)[0]["images"]
    np.testing.assert_array_equal(image_format.to_values(sample).permute(1, 2, 0).numpy(), good)
    assert "a.png became values outside the range (values from 0 to 2000, outside of 0 to 1000)" in caplog.text


def test_images_in_memory_are_surveyed_without_a_cache():
    class Images:
        column_names = ["image"]

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return {"image": floats(index, 2)}

    image_format = find_image_format(Images(), FormatRequest(value_range=(-9, 9)))
    assert image_format == ImageFormat("array", 2, (-9, 9), None)
    sample = ImageDataset(Images(), SIZE, image_format=image_format)[1]["images"]
    np.testing.assert_allclose(image_format.to_values(sample).permute(1, 2, 0), floats(1, 2), rtol=0, atol=18e-6)


def test_conditions_of_any_format(tmp_path):
    images = [integers(seed, 1, 4095) for seed in range(2)]
    conditions = [integers(seed + 5, 3, 6, dtype=np.uint8) for seed in range(2)]

    def encoded(values):
        file = io.BytesIO()
        np.save(file, values)
        return {"bytes": file.getvalue(), "path": None}

    table = pyarrow.table({"image": list(map(encoded, images)), "regions": list(map(encoded, conditions))})
    pyarrow.parquet.write_table(table, tmp_path / "data.parquet")
    dataset, _ = load_image_dataset(
        data_files=str(tmp_path / "data.parquet"), conditioning_image_column="regions", cache_dir=str(tmp_path)
    )
    image_format = find(dataset, value_range=(0, 4095))
    request = FormatRequest(image_mode="array", value_range="auto")
    condition_format = find_image_format(dataset, request, column="conditioning_image")
    assert condition_format == ImageFormat("array", 3, (0, 6), 7)
    formats = {"image_format": image_format, "condition_format": condition_format}
    dataset, skipped = check_images(dataset, SIZE, **formats)
    assert not skipped
    data = ImageDataset(dataset, SIZE, random_flip=True, **formats)
    assert (data.size, data.resolution, data.condition_format) == (SIZE, SIZE, condition_format)
    flipped = set()
    for epoch in range(8):
        data.set_epoch(epoch)
        example = data[1]
        image, condition = images[1], conditions[1] / 6
        found = image_format.to_values(example["images"]).permute(1, 2, 0).numpy()
        if not np.array_equal(found, image):
            image, condition = image[:, ::-1], condition[:, ::-1]
            flipped.add(epoch)
        np.testing.assert_array_equal(found, image)
        np.testing.assert_allclose(example["conditions"].permute(1, 2, 0), condition, rtol=0, atol=1e-7)
    assert 0 < len(flipped) < 8


def test_made_conditions_need_pictures():
    dataset = datasets.Dataset.from_dict({"image": [{"bytes": b"", "path": None}]})
    with pytest.raises(ValueError, match="kind .edges. are made from grey or RGB images, but these are 3-channel"):
        ImageDataset(dataset, 8, condition="edges", image_format=ImageFormat("array", 3))
