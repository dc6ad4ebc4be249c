"""Readers: files of each kind written by another library than the one that reads, and files that cannot be read."""

import io
import pickle
import struct
import sys

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from diffusers_adm.data.pixels import MISSING, TOO_LARGE, UNREADABLE, UNSUPPORTED, UnusableImageError, open_image


def random_values(shape, dtype, seed=0):
    generator = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return generator.standard_normal(shape).astype(dtype)
    if np.dtype(dtype) == bool:
        return generator.random(shape) < 0.5
    info = np.iinfo(dtype)
    return generator.integers(info.min, info.max, shape, dtype=dtype, endpoint=True)


def stored(content, path=None):
    return {"bytes": content, "path": path}


def tiff(values, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, values, **options)
    return stored(file.getvalue())


def pillow(image, image_format, **options):
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return stored(file.getvalue())


def npy(values, **options):
    file = io.BytesIO()
    np.save(file, values, **options)
    return stored(file.getvalue())


def npz(**arrays):
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return stored(file.getvalue())


def read(image, channels=None):
    with open_image(image, channels) as opened:
        values = opened.read()
        assert values.dtype == opened.dtype
        assert values.dtype.isnative
        assert values.shape[2] == opened.channels
        return opened.mode, values


def fails(image, reason, match, channels=None):
    with pytest.raises(UnusableImageError, match=match) as caught, open_image(image, channels) as opened:
        opened.read()
    assert caught.value.reason == reason


class TestPillow:
    @pytest.mark.parametrize("mode,channels", [("L", 1), ("LA", 2), ("RGB", 3), ("RGBA", 4)])
    @pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
    def test_eight_bits(self, mode, channels, image_format):
        values = random_values((5, 7, channels), np.uint8)
        image = Image.fromarray(values[..., 0] if channels == 1 else values, mode)
        found, read_values = read(pillow(image, image_format))
        assert found == mode
        np.testing.assert_array_equal(read_values, values)

    def test_palette_and_transparent_colour(self):
        image = Image.new("P", (2, 1))
        image.putpalette([255, 0, 0, 0, 0, 255])
        image.putdata([0, 1])
        assert read(pillow(image, "PNG"))[0] == "RGB"
        mode, values = read(pillow(image, "PNG", transparency=1))
        assert mode == "RGBA"
        np.testing.assert_array_equal(values[0], [[255, 0, 0, 255], [0, 0, 255, 0]])
        assert read(pillow(Image.new("L", (2, 2), 9), "PNG", transparency=9))[0] == "LA"

    def test_an_open_image(self):
        values = random_values((5, 7, 3), np.uint8)
        np.testing.assert_array_equal(read(Image.fromarray(values))[1], values)

    def test_sixteen_bit_grey(self):
        values = random_values((5, 7), np.uint16)
        pgm = b"P5 7 5 65535\n" + values.astype(">u2").tobytes()
        for image in (stored(imagecodecs.png_encode(values)), stored(pgm), tiff(values), tiff(values, byteorder=">")):
            mode, read_values = read(image)
            assert (mode, read_values.dtype) == ("L", np.uint16)
            np.testing.assert_array_equal(read_values[..., 0], values)


class TestDeepColour:
    @pytest.mark.parametrize("mode,channels", [("LA", 2), ("RGB", 3), ("RGBA", 4)])
    def test_png(self, mode, channels):
        values = random_values((5, 7, channels), np.uint16)
        found, read_values = read(stored(imagecodecs.png_encode(values)))
        assert found == mode
        np.testing.assert_array_equal(read_values, values)

    def test_orientation(self):
        values = random_values((5, 7, 3), np.uint16)
        encoded = imagecodecs.png_encode(values)
        exif = Image.Exif()
        exif[274] = 6  # viewers turn it clockwise
        content = exif.tobytes()[6:]  # without "Exif\0\0"
        chunk = b"eXIf" + content
        chunk = struct.pack(">I", len(content)) + chunk + struct.pack(">I", imagecodecs.zlib_crc32(chunk))
        encoded = encoded[:33] + chunk + encoded[33:]  # after the header
        np.testing.assert_array_equal(read(stored(encoded))[1], np.rot90(values, -1))

    def test_formats_that_only_pillow_reads_are_refused(self):
        ppm = b"P6 2 1 65535\n" + bytes(12)
        fails(stored(ppm), UNSUPPORTED, "a PPM file of 16 bits per channel, which Pillow reduces to 8. Save it as PNG")
        sixteen = imagecodecs.jpeg2k_encode(random_values((32, 32, 3), np.uint16), level=0)
        fails(stored(sixteen), UNSUPPORTED, "a JPEG2000 file of 16 bits")
        eight = random_values((32, 32, 3), np.uint8)
        found = read(stored(imagecodecs.jpeg2k_encode(eight, level=0, reversible=True)))[1]
        np.testing.assert_array_equal(found, eight)

    @pytest.mark.parametrize("module,write", [("imagecodecs", imagecodecs.png_encode), ("tifffile", tiff)])
    def test_without_the_extra(self, module, write, monkeypatch):
        image = write(random_values((5, 7, 3), np.uint16))
        image = image if isinstance(image, dict) else stored(image)
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=rf"needs {module}: `pip install diffusers-adm\[train\]`"):
            read(image)

    def test_the_file_that_needs_the_extra_is_named(self, monkeypatch):
        image = stored(imagecodecs.png_encode(random_values((5, 7, 3), np.uint16)), "deep/a.png")
        monkeypatch.setitem(sys.modules, "imagecodecs", None)
        with pytest.raises(ImportError, match="^deep/a.png needs imagecodecs: `pip install"):
            read(image)


class TestTiff:
    @pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64"])
    @pytest.mark.parametrize("planar", ["contig", "separate"])
    @pytest.mark.parametrize("byteorder", ["<", ">"])
    def test_many_channels_of_each_type(self, dtype, planar, byteorder):
        values = random_values((6, 7, 5), dtype)
        written = values if planar == "contig" else np.moveaxis(values, -1, 0)
        mode, found = read(tiff(written, photometric="minisblack", planarconfig=planar, byteorder=byteorder))
        assert (mode, found.dtype) == ("array", dtype)
        np.testing.assert_array_equal(found, values)

    @pytest.mark.parametrize("compression", ["zlib", "lzw", "zstd", "jpegxl", "lerc", "packbits"])
    def test_compressed(self, compression):
        options = {"compressionargs": {"lossless": True}} if compression == "jpegxl" else {}
        for shape in ((16, 17), (16, 17, 3)):
            values = random_values(shape, np.uint16)
            photometric = "rgb" if len(shape) == 3 else "minisblack"
            found = read(tiff(values, photometric=photometric, compression=compression, **options))[1]
            np.testing.assert_array_equal(found.reshape(shape), values)

    def test_predictor_and_tiles(self):
        values = random_values((40, 50, 3), np.uint16)
        options = {"photometric": "rgb", "compression": "zlib", "predictor": True, "tile": (16, 16)}
        np.testing.assert_array_equal(read(tiff(values, **options))[1], values)

    @pytest.mark.parametrize("dtype", ["uint8", "uint16"])
    def test_extra_samples_decide_what_is_alpha(self, dtype):
        values = random_values((6, 7, 4), dtype)
        for kind, mode in (("unassalpha", "RGBA"), ("unspecified", "array")):
            found_mode, found = read(tiff(values, photometric="rgb", extrasamples=[kind]))
            assert found_mode == mode
            np.testing.assert_array_equal(found, values)
        for kind, mode in (("unassalpha", "LA"), ("unspecified", "array")):
            two = tiff(values[..., :2], photometric="minisblack", planarconfig="contig", extrasamples=[kind])
            assert read(two)[0] == mode

    def test_premultiplied_alpha(self):
        alpha = np.array([[0, 1000, 40000, 65535]], dtype=np.uint16)
        colour = np.array([[0, 1000, 20000, 30000]], dtype=np.uint16)
        values = np.stack([colour, colour // 2, colour // 4, alpha], axis=-1)
        mode, found = read(tiff(values, photometric="rgb", extrasamples=["assocalpha"]))
        assert mode == "RGBA"
        np.testing.assert_array_equal(found[0, :, 0], [0, 65535, round(20000 / 40000 * 65535), 30000])
        np.testing.assert_array_equal(found[..., 3], alpha)

    @pytest.mark.parametrize("dtype,white", [("uint8", 255), ("uint16", 65535), ("int16", -1)])
    def test_white_is_lowest(self, dtype, white):
        values = random_values((6, 7), dtype)
        found = read(tiff(values, photometric="miniswhite"))[1][..., 0]
        np.testing.assert_array_equal(found.astype(int), white - values.astype(int))

    def test_white_is_lowest_within_twelve_bits(self):
        """Packed by hand, since two samples share a byte: 0x000, 0xFFF, 0x123, 0x456."""
        tags = {256: 4, 257: 1, 258: 12, 259: 1, 262: 0, 273: 8, 277: 1, 278: 1, 279: 6}
        entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
        data = bytes([0x00, 0x0F, 0xFF, 0x12, 0x34, 0x56]) + bytes(2)
        file = b"II*\0" + struct.pack("<I", 16) + data + struct.pack("<H", len(tags)) + entries + bytes(4)
        mode, found = read(stored(file))
        assert (mode, found.dtype) == ("L", np.uint16)
        np.testing.assert_array_equal(found[0, :, 0], [0xFFF, 0x000, 0xFFF - 0x123, 0xFFF - 0x456])

    def test_white_is_lowest_of_floating_point_numbers(self):
        fails(tiff(random_values((6, 7), "float32"), photometric="miniswhite"), UNSUPPORTED, "MINISWHITE")

    def test_palette_of_sixteen_bits(self):
        palette = random_values((3, 65536), np.uint16)
        indices = random_values((6, 7), np.uint16)
        mode, found = read(tiff(indices, photometric="palette", colormap=palette))
        assert mode == "RGB"
        np.testing.assert_array_equal(found, palette.T[indices])

    def test_separated_inks_are_refused(self):
        image = tiff(random_values((6, 7, 4), np.uint16), photometric="separated")
        fails(image, UNSUPPORTED, "photometric interpretation SEPARATED")

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_orientation(self, orientation):
        """The same as Pillow's, which reads 8 bits."""
        values = random_values((6, 7, 3), np.uint8)
        tags = [(274, 3, 1, orientation, True)]
        expected = read(tiff(values, photometric="rgb", extratags=tags))[1]
        found = read(tiff(values.astype(np.uint16), photometric="rgb", extratags=tags))[1]
        np.testing.assert_array_equal(found, expected)
        assert (expected.shape == values.shape) == (orientation < 5)

    def test_pages_are_channels_if_the_file_says_so(self):
        values = random_values((6, 7, 5), np.uint16)
        pages = np.moveaxis(values, -1, 0)
        for channels in (5, None):
            np.testing.assert_array_equal(read(tiff(pages, imagej=True), channels)[1], values)
        np.testing.assert_array_equal(read(tiff(pages), channels=5)[1], values)
        np.testing.assert_array_equal(read(tiff(pages, metadata=None))[1], values[..., :1])  # the first of many frames

    @pytest.mark.filterwarnings("ignore::UserWarning:PIL")
    def test_damage(self):
        content = tiff(random_values((40, 50, 5), np.uint16), photometric="minisblack", planarconfig="contig")["bytes"]
        for length in (6, 20, 100):
            fails(stored(content[:length]), UNREADABLE, ".")

    def test_too_large(self, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
        values = random_values((6, 7, 5), "float32")
        fails(
            tiff(values, photometric="minisblack", planarconfig="contig"),
            TOO_LARGE,
            "42 pixels exceed twice Pillow's limit of 10",
        )


class TestArrays:
    @pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", ">u2", "int64", "float16", "float32", ">f8"])
    @pytest.mark.parametrize("write", [npy, lambda values: npz(image=values)])
    def test_each_type(self, dtype, write):
        for shape in ((6, 7), (6, 7, 1), (6, 7, 5)):
            values = random_values(shape, np.dtype(dtype).newbyteorder("=")).astype(dtype)
            mode, found = read(write(values))
            assert mode == ("array" if shape[-1] == 5 else "L")
            assert found.dtype == np.dtype(dtype).newbyteorder("=")
            np.testing.assert_array_equal(found.reshape(shape), values)

    def test_files_are_told_by_their_content_and_by_their_name(self, tmp_path):
        values = random_values((6, 7), np.int16)
        (tmp_path / "a.bin").write_bytes(npy(values)["bytes"])
        np.testing.assert_array_equal(read(stored(None, str(tmp_path / "a.bin")))[1][..., 0], values)
        (tmp_path / "a.npy").write_bytes(b"no array")
        fails(stored(None, str(tmp_path / "a.npy")), UNREADABLE, "neither a .npy nor a .npz file")

    def test_nested_lists(self):
        assert read([[1, 2], [3, 4]])[1].tolist() == [[[1], [2]], [[3], [4]]]

    def test_channels_first(self):
        values = random_values((6, 7, 5), np.float32)
        first = np.moveaxis(values, -1, 0)
        np.testing.assert_array_equal(read(first, channels=5)[1], values)
        np.testing.assert_array_equal(read(values, channels=5)[1], values)
        assert read(random_values((5, 7, 5), np.float32), channels=5)[1].shape == (5, 7, 5)
        fails(first, UNSUPPORTED, r"shape \(5, 6, 7\), which looks like \(channels, height, width\)")

    @pytest.mark.parametrize("shape", [(32, 16, 16), (16, 16, 16), (5, 7, 5)])
    def test_ambiguous_axes(self, shape):
        """As many channels as columns, or more: nothing but the number of channels tells the axes apart."""
        values = random_values(shape, np.float32)
        pattern = rf"shape \({', '.join(map(str, shape))}\), which may be \(height, width, channels\) or \(channels, "
        for image in (values, npy(values), tiff(values, photometric="minisblack")):
            fails(image, UNSUPPORTED, pattern + ".*set `in_channels` in the network's config")
        first, last = np.moveaxis(values, 0, -1), values
        np.testing.assert_array_equal(read(values, shape[0])[1], last if shape[-1] == shape[0] else first)
        np.testing.assert_array_equal(read(values, shape[-1])[1], last)

    def test_transposing_is_only_advised_where_it_helps(self):
        for shape, helps in (((5, 6, 7), True), ((5, 7, 5), False), ((32, 16, 16), False), ((16, 16, 16), False)):
            values = random_values(shape, np.float32)
            way_out = "Transpose it to" if helps else "Say how many channels it has"
            fails(values, UNSUPPORTED, rf"\. {way_out}")
            if helps:
                transposed = values.transpose(1, 2, 0)
                np.testing.assert_array_equal(read(transposed)[1], transposed)

    def test_a_single_row_or_column_of_grey(self):
        for shape in ((1, 7, 1), (7, 1, 1), (1, 1, 1)):
            assert read(random_values(shape, np.float32))[1].shape == shape

    def test_objects_are_never_unpickled(self, tmp_path):
        objects = np.array([[1, print]], dtype=object)
        fails(npy(objects, allow_pickle=True), UNSUPPORTED, "an array of Python objects, which is never unpickled")
        fails(npz(image=objects), UNSUPPORTED, "an array of Python objects, which is never unpickled")
        path = tmp_path / "a.npy"
        path.write_bytes(pickle.dumps(np.zeros((4, 4))))
        fails(stored(None, str(path)), UNSUPPORTED, "a pickle, which is never unpickled")

    def test_what_is_no_image(self):
        fails(npy(np.zeros((0, 7))), UNSUPPORTED, r"an empty array of shape \(0, 7\)")
        fails(npy(np.zeros((2, 6, 7, 3))), UNSUPPORTED, r"an array of shape \(2, 6, 7, 3\). Store one image as")
        fails(npy(np.zeros(3)), UNSUPPORTED, r"an array of shape \(3,\)")
        fails(npy(np.zeros((6, 7), complex)), UNSUPPORTED, "an array of type complex128")
        fails(npy(np.full((6, 7), "a")), UNSUPPORTED, "an array of type <U1")
        fails(npz(a=np.zeros((6, 7)), b=np.zeros((6, 7))), UNSUPPORTED, "with 2 arrays .a.npy, b.npy.")

    def test_damage(self, tmp_path):
        for content in (npy(np.zeros((6, 7)))["bytes"][:100], npz(a=np.zeros((6, 7)))["bytes"][:100]):
            fails(stored(content), UNREADABLE, ".")
        fails(None, MISSING, "the entry is empty")
        fails(stored(None, str(tmp_path / "a.npy")), MISSING, "no such file")
