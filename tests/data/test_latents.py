"""Latents as data: what `encode_latents` stores, reading it back, its damage, and the examples of `LatentDataset`."""

import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from runs import flags
from tiny_autoencoders import SCALING, SHIFT, random_tiny, random_vae, random_vq, save_vae
from tolerances import NETWORK, rounding_errors

from diffusers_adm.conditioning.image_format import ImageFormat
from diffusers_adm.conditioning.latents import LatentSpace, Posterior
from diffusers_adm.data import encode_latents, latents
from diffusers_adm.data.columns import load_image_dataset
from diffusers_adm.data.images import ImageDataset
from diffusers_adm.data.latents import (
    LatentDataset,
    StoredLatents,
    check_latents,
    find_stored_latents,
    hash_autoencoder,
    load_autoencoder,
    load_latents,
)
from diffusers_adm.data.samplers import BalancedClassSampler, EpochShuffleSampler


NAMES = ["cat", "dog", "owl"]
COUNT = 7


def write_images(path, size=(8, 8), count=COUNT):
    """A parquet file with classes of names, one of them without images, an unlabelled row, captions and conditions."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (count, *size, 3), dtype=np.uint8)
    columns = {
        "image": [Image.fromarray(values) for values in pixels],
        "kind": [(0, 2)[index % 2] for index in range(count - 1)] + [-1],
        "text": [f"image {index}" if index else None for index in range(count)],
        "edges": [Image.fromarray(255 - values) for values in pixels],
    }
    features = {"image": datasets.Image(), "kind": datasets.ClassLabel(names=NAMES), "text": datasets.Value("string")}
    data = datasets.Dataset.from_dict(columns, datasets.Features({**features, "edges": datasets.Image()}))
    data.to_parquet(str(path))
    return str(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with images, an autoencoder, and float32 latents with flips in three files."""
    folder = tmp_path_factory.mktemp("latents")
    write_images(folder / "images.parquet")
    save_vae(folder / "vae", image_format=ImageFormat())
    encode(
        folder, folder / "stored", dtype="float32", random_flip=True, shard_size=3, conditioning_image_column="edges"
    )
    return folder


def encode(folder, output, **arguments):
    given = {"vae": folder / "vae", "data_files": folder / "images.parquet", "resolution": 8, "batch_size": 2}
    given |= {"label_column": "kind", "caption_column": "text", "output_dir": output}
    given |= arguments
    encode_latents.main(flags(**{name: value for name, value in given.items() if value is not None}))
    return output


def read(folder, **arguments):
    stored = StoredLatents.read(folder)
    data, id2label = load_latents(str(folder), stored, "kind", "text", **arguments)
    return stored, data, id2label


def images_of(made, **arguments):
    return load_image_dataset(
        data_files=str(made / "images.parquet"), label_column="kind", caption_column="text", **arguments
    )


def posterior_of(made, images):
    """By diffusers' own class."""
    vae = latents.AutoencoderKL.from_pretrained(made / "vae")
    with torch.no_grad():
        return vae.encode(images).latent_dist


class TestStoring:
    def test_values_are_those_of_the_autoencoder(self, made):
        stored, data, id2label = read(made / "stored")
        pixels = ImageDataset(images_of(made)[0], 8, center_crop=True)
        images = torch.stack([pixels[index]["images"] for index in range(COUNT)])
        assert len(list((made / "stored").glob("latents-*-of-00003.parquet"))) == 3
        assert id2label == dict(enumerate(NAMES))
        for names, shown in ((latents.PLAIN, images), (latents.FLIPPED, images.flip(-1))):
            distribution = posterior_of(made, shown)
            for name, expected in zip(names, (distribution.mean, distribution.std), strict=True):
                assert rounding_errors(torch.tensor(data[name][:]).view(-1, *stored.shape), expected) <= NETWORK

    def test_columns_are_those_of_the_images(self, made):
        images, id2label = images_of(made)
        _, data, stored_names = read(made / "stored")
        assert stored_names == id2label
        assert data["label"][:] == images["label"][:]
        assert data["caption"][:] == images["caption"][:]

    def test_record(self, made):
        stored = StoredLatents.read(made / "stored")
        vae = load_autoencoder("vae", str(made / "vae")).vae
        assert stored.autoencoder == hash_autoencoder(vae)
        assert (stored.scaling_factor, stored.shift_factor, stored.shape) == (SCALING, SHIFT, (4, 4, 4))
        assert (stored.resolution, stored.dtype, stored.image_format) == (8, "float32", ImageFormat())
        assert (stored.num_images, stored.num_cropped, stored.random_flip) == (COUNT, 0, True)
        assert find_stored_latents(str(made)) is None
        assert find_stored_latents(None) is None

    def test_float16_is_the_rounded_float32(self, made, tmp_path):
        encode(made, tmp_path / "half")
        _, half, _ = read(tmp_path / "half")
        _, full, _ = read(made / "stored")
        for name in latents.PLAIN:
            expected = torch.tensor(full[name][:])
            torch.testing.assert_close(torch.tensor(half[name][:]), expected, rtol=2**-10, atol=1e-6)
        assert "latent_mean_flipped" not in half.column_names

    @pytest.mark.parametrize(
        "config",
        [{}, {"latents_mean": [0.5, 0.0, -0.5, 1.0], "latents_std": [0.5, 1.0, 2.0, 4.0], "shift_factor": None}],
    )
    def test_samples_of_the_data_are_described(self, made, tmp_path, capsys, config):
        save_vae(tmp_path / "vae", random_vae(**config))
        encode(made, tmp_path / "out", dtype="float32", vae=tmp_path / "vae")
        stored, data, _ = read(tmp_path / "out")
        shape = (-1, *stored.shape)
        mean, std = (torch.tensor(data[name][:], dtype=torch.float64).view(shape) for name in latents.PLAIN)
        shift, scale = SHIFT, SCALING
        if config:
            shift, divisor = (torch.tensor(config[name])[:, None, None] for name in ("latents_mean", "latents_std"))
            scale = SCALING / divisor
        samples = (mean - shift) * scale
        total = ((samples - samples.mean()) ** 2 + (std * scale) ** 2).mean().sqrt()
        assert f"mean {samples.mean():.3f} and standard deviation {total:.3f}" in capsys.readouterr().out

    def test_an_unusual_scale_is_reported(self, made, tmp_path, caplog):
        save_vae(tmp_path / "vae", random_vae(scaling_factor=40.0))
        encode(made, tmp_path / "wide", vae=tmp_path / "vae", dtype="float32")
        assert "Set `scaling_factor` of the autoencoder to" in caplog.text

    @pytest.mark.parametrize("make", [random_vq, random_tiny])
    def test_autoencoders_without_a_distribution(self, made, tmp_path, make):
        save_vae(tmp_path / "vae", make())
        encode(made, tmp_path / "out", vae=tmp_path / "vae", dtype="float32")
        stored, data, _ = read(tmp_path / "out")
        pixels = ImageDataset(images_of(made)[0], 8, center_crop=True)
        with torch.no_grad():
            expected = make().encode(pixels[1]["images"][None]).latents
        assert rounding_errors(torch.tensor(data[1]["latent_mean"]).view(1, *stored.shape), expected) <= NETWORK
        assert not np.any(data["latent_std"][:])

    def test_a_folder_of_images_of_another_shape_and_depth(self, made, tmp_path):
        vae = random_vae(in_channels=1, out_channels=1)
        save_vae(tmp_path / "vae", vae)
        values = np.random.default_rng(0).integers(0, 65536, (3, 16, 24), dtype=np.uint16)
        (tmp_path / "images").mkdir()
        for index, image in enumerate(values):
            Image.fromarray(image).save(tmp_path / "images" / f"{index}.png")
        encode(
            made,
            tmp_path / "out",
            vae=tmp_path / "vae",
            data_files=None,
            train_data_dir=tmp_path / "images",
            label_column=None,
            caption_column=None,
            resolution="8x8",
            dtype="float32",
        )
        stored = StoredLatents.read(tmp_path / "out")
        assert stored.image_format == ImageFormat("L", 1, (0, 65535), 65536)
        assert (stored.num_cropped, stored.num_images) == (3, 3)
        data, _ = load_latents(str(tmp_path / "out"), stored)
        assert data["image_name"][:] == ["0.png", "1.png", "2.png"]

    def test_nothing_is_there_before_all_is(self, made, tmp_path, monkeypatch):
        """A run that is killed leaves no folder of this name, and the next one starts anew."""
        write = StoredLatents.write

        def fail(self, folder):
            raise KeyboardInterrupt

        monkeypatch.setattr(StoredLatents, "write", fail)
        with pytest.raises(KeyboardInterrupt):
            encode(made, tmp_path / "out", shard_size=1)
        assert not (tmp_path / "out").exists()
        monkeypatch.setattr(StoredLatents, "write", write)
        encode(made, tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
        assert len(list((tmp_path / "out").glob("*.parquet"))) == 1


class TestRefusals:
    def test_nan_is_named_by_image(self, made, tmp_path):
        vae = random_vae()
        vae.encoder.conv_in.weight.data.fill_(3e38)  # finite, and overflows
        save_vae(tmp_path / "vae", vae)
        with pytest.raises(ValueError, match="encodes row 0, row 1 to NaN or infinite values"):
            encode(made, tmp_path / "out", vae=tmp_path / "vae")
        assert not (tmp_path / "out").exists()

    def test_float16_that_does_not_hold_the_latents(self, made, tmp_path):
        vae = random_vae()
        vae.quant_conv.bias.data[:4] += 1e4
        save_vae(tmp_path / "vae", vae)
        with pytest.raises(ValueError, match="`dtype` float16 does not hold the latents of row 0.*--dtype float32"):
            encode(made, tmp_path / "out", vae=tmp_path / "vae")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"resolution": 9}, "`resolution` is 9 x 9, but `vae` downsamples by 2.*10 x 10"),
            ({"vae": "nowhere"}, "`vae` is 'nowhere', which is no file or folder"),
            ({"caption_column": "latent_mean"}, "'latent_mean' has a name that latents need"),
            ({"condition_value_range": [0, 1]}, "without `conditioning_image_column`"),
            ({"condition": "edges", "conditioning_image_column": "edges"}, "Pass one of them"),
            ({"condition": "edges", "condition_value_range": [0, 1]}, "of a format of its own"),
            ({"image_mode": "L"}, "`--image_mode` is L, but the model was trained on RGB"),
            ({"value_range": [0, 300]}, "The images are RGB images from 0 to 300.*the autoencoder was trained on RGB"),
        ],
    )
    def test_arguments(self, made, tmp_path, arguments, message):
        with pytest.raises(ValueError, match=message):
            encode(made, tmp_path / "out", **arguments)
        assert not (tmp_path / "out").exists()

    def test_a_folder_that_is_not_empty(self, made):
        with pytest.raises(ValueError, match="is not empty"):
            encode(made, made / "stored")

    def test_a_network_that_is_no_autoencoder(self, made, tmp_path):
        config = json.loads((made / "vae" / "config.json").read_text()) | {"_class_name": "UNet2DModel"}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="holds a UNet2DModel, which is no autoencoder"):
            load_autoencoder("vae", str(tmp_path))

    def test_a_config_without_a_scale(self, made, tmp_path, caplog):
        for value, name in ((None, "null"), ("left out", "missing")):
            shutil.copytree(made / "vae", tmp_path / name)
            config = json.loads((made / "vae" / "config.json").read_text()) | {"scaling_factor": value}
            if value is not None:
                del config["scaling_factor"]
            (tmp_path / name / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="`scaling_factor` None"):
            load_autoencoder("vae", str(tmp_path / "null"))
        assert load_autoencoder("vae", str(tmp_path / "missing")).vae.config.scaling_factor == 0.18215
        assert "has no `scaling_factor`; diffusers takes 0.18215" in caplog.text

    @pytest.mark.parametrize("scale", ["big", [1.0], 0, float("nan")])
    def test_a_scale_that_is_no_positive_number(self, scale):
        vae = random_vae()
        vae.register_to_config(scaling_factor=scale)
        with pytest.raises(ValueError, match="must be a positive number"):
            LatentSpace(vae)
        vae.register_to_config(scaling_factor=1.0, shift_factor=None, latents_mean=["0"] * 4, latents_std=0.5)
        with pytest.raises(ValueError, match="Set both lists, with 4 finite numbers"):
            LatentSpace(vae)

    def test_a_file_and_weights_that_are_not_finite(self, made, tmp_path):
        with pytest.raises(ValueError, match="config.json', which is a file. Name the folder"):
            load_autoencoder("vae", str(made / "vae" / "config.json"))
        vae = random_vae()
        vae.decoder.conv_in.bias.data[0] = torch.inf
        with pytest.raises(ValueError, match="Weights of `vae` are not finite.*decoder.conv_in.bias"):
            load_autoencoder("vae", save_vae(tmp_path, vae))

    def test_damaged_folders(self, made, tmp_path):
        def copy(name):
            return shutil.copytree(made / "stored", tmp_path / name)

        folder = copy("lost")
        (folder / "latents-00001-of-00003.parquet").unlink()
        with pytest.raises(ValueError, match=f"holds 4 rows, but {COUNT} were written"):
            read(folder)
        folder = copy("truncated")
        (folder / "latents-00001-of-00003.parquet").write_bytes(b"PAR1")
        with pytest.raises(ValueError, match="The latents in .*truncated cannot be read.*Encode the images again"):
            read(folder)
        folder = copy("other type")
        record = json.loads((folder / "latents.json").read_text())
        (folder / "latents.json").write_text(json.dumps(record | {"dtype": "float16"}))
        with pytest.raises(ValueError, match="64 numbers of type float32 .* latents.json says 64 of float16"):
            read(folder)
        (folder / "latents.json").write_text(json.dumps(record | {"version": 9}))
        with pytest.raises(ValueError, match="is of version 9"):
            read(folder)
        (folder / "latents.json").write_text("{}")
        with pytest.raises(ValueError, match="cannot be read: KeyError"):
            read(folder)

    @pytest.mark.parametrize(("name", "value"), [("latent_mean", np.nan), ("latent_std_flipped", -1.0)])
    def test_values_that_no_autoencoder_gives(self, made, tmp_path, name, value):
        folder = shutil.copytree(made / "stored", tmp_path / "damaged")
        path = folder / "latents-00001-of-00003.parquet"  # rows 3 to 5
        table = pyarrow.parquet.read_table(path)
        rows = table.column(name).to_pylist()
        rows[1][5] = value
        position, field = table.column_names.index(name), table.schema.field(name)
        pyarrow.parquet.write_table(table.set_column(position, field, pyarrow.array([*rows], field.type)), path)
        stored, data, _ = read(folder)
        with pytest.raises(ValueError, match=f"of 1 of {COUNT} images .* are NaN, infinite or have negative.*: row 4"):
            check_latents(data, stored, str(folder))

    def test_folders_of_latents_are_no_folders_of_images(self, made):
        with pytest.raises(ValueError, match="holds latents"):
            load_image_dataset(train_data_dir=str(made / "stored"))


class TestDataset:
    @pytest.fixture
    def both(self, made):
        """The same examples: encoded when they are needed, and stored."""
        pixels, _ = images_of(made, conditioning_image_column="edges")
        options = {"random_flip": True, "seed": 3, "condition_format": ImageFormat()}
        images = ImageDataset(pixels, 8, latent_shape=(4, 4, 4), image_format=ImageFormat(), **options)
        stored, data, _ = read(made / "stored", conditioning_image_column="edges")
        return images, LatentDataset(check_latents(data, stored, "here"), 8, stored=stored, **options)

    def test_examples_agree(self, made, both):
        """The flip, the noise, and so the sample, of every epoch."""
        images, stored = both
        space = LatentSpace(random_vae())
        for epoch in range(2):
            images.set_epoch(epoch)
            stored.set_epoch(epoch)
            for index in range(COUNT):
                now, before = images[index], stored[index]
                assert torch.equal(now["latent_noise"], before["latent_noise"])
                assert torch.equal(now["conditions"], before["conditions"])
                assert torch.equal(now["class_labels"], before["class_labels"])
                with torch.no_grad():
                    expected = space.encode(now["images"][None], now["latent_noise"])
                posterior = Posterior(before["latent_mean"][None], before["latent_std"][None])
                assert rounding_errors(space.to_samples(posterior, before["latent_noise"]), expected) <= NETWORK
        assert not torch.equal(stored[0]["latent_noise"], stored[1]["latent_noise"])

    @pytest.mark.parametrize("kind", ["edges", "color_blocks"])
    def test_conditions_that_are_made_from_the_images(self, made, tmp_path, kind):
        """They are those of training on the images, without flips: edges of a mirrored image may be others."""
        encode(made, tmp_path / "stored", condition=kind, dtype="float32")
        pixels, _ = images_of(made)
        images = ImageDataset(pixels, 8, latent_shape=(4, 4, 4), image_format=ImageFormat(), condition=kind)
        stored, data, _ = read(tmp_path / "stored", conditioning_image_column="conditioning_image")
        assert (stored.condition, stored.condition_format) == (kind, images.condition_format)
        dataset = LatentDataset(data, 8, stored=stored, condition_format=stored.condition_format)
        conditions = torch.stack([dataset[index]["conditions"] for index in range(COUNT)])
        expected = torch.stack([images[index]["conditions"] for index in range(COUNT)])
        # Stored with 8 bits: of edges all, of mean colours all but half a level.
        torch.testing.assert_close(conditions, expected, rtol=0, atol=0 if kind == "edges" else 0.5 / 255 + 1e-6)
        assert expected.std() > 0

    def test_noise_is_standard_normal_and_new_in_each_epoch(self, both):
        _, stored = both
        noise = []
        for epoch in range(20):
            stored.set_epoch(epoch)
            noise += [stored[index]["latent_noise"] for index in range(COUNT)]
        noise = torch.stack(noise)
        assert len({tuple(x.flatten().tolist()) for x in noise}) == len(noise)
        assert abs(noise.mean()) < 4 / noise.numel() ** 0.5
        assert abs(noise.std() - 1) < 4 / (2 * noise.numel()) ** 0.5

    def test_half_of_the_examples_are_flipped(self, both):
        _, stored = both
        plain = LatentDataset.__getitem__
        mirrored = 0
        for epoch in range(20):
            stored.set_epoch(epoch)
            for index in range(COUNT):
                found = plain(stored, index)["latent_mean"].flatten()
                rows = [torch.tensor(stored.latents[index][name]) for name in ("latent_mean", "latent_mean_flipped")]
                assert sum(torch.equal(found, row) for row in rows) == 1
                mirrored += torch.equal(found, rows[1])
        assert 0.3 < mirrored / (20 * COUNT) < 0.7

    def test_subsets_and_samplers(self, made):
        stored, data, _ = read(made / "stored", max_train_samples=4, seed=1)
        chosen, _ = images_of(made, max_train_samples=4, seed=1)
        assert data["row"][:] == chosen["row"][:]
        dataset = LatentDataset(check_latents(data, stored, "here", allow_unlabelled=False), 8, stored=stored)
        everything = LatentDataset(read(made / "stored")[1], 8, stored=stored)
        assert -1 not in dataset.dataset["label"][:]
        for index, row in enumerate(dataset.dataset["row"][:]):
            assert torch.equal(dataset[index]["latent_mean"], everything[row]["latent_mean"])
        assert sorted(EpochShuffleSampler(everything)) == list(range(COUNT))
        labels = everything.dataset["label"][:]
        drawn = [labels[index] for index in BalancedClassSampler(everything, labels)]
        counts = [drawn.count(label) for label in set(labels)]
        assert max(counts) - min(counts) <= 1

    def test_other_processes_open_the_files_themselves(self, both):
        _, stored = both
        assert len(pickle.dumps(stored)) < 20_000
        copied = pickle.loads(pickle.dumps(stored))
        assert torch.equal(copied[2]["latent_mean"], stored[2]["latent_mean"])

    def test_flips_need_mirrored_latents(self, made, tmp_path):
        encode(made, tmp_path / "out")
        stored, data, _ = read(tmp_path / "out")
        with pytest.raises(ValueError, match="`random_flip` needs the latents of mirrored images"):
            LatentDataset(data, 8, stored=stored, random_flip=True)
        with pytest.raises(ValueError, match="`condition` 'edges' is made from pixels"):
            LatentDataset(data, 8, stored=stored, condition="edges")


def test_the_hash_depends_on_weights_and_scale_only(made, tmp_path):
    vae = random_vae()
    saved = load_autoencoder("vae", save_vae(tmp_path / "elsewhere")).vae
    assert (
        hash_autoencoder(saved)
        == hash_autoencoder(vae)
        == hash_autoencoder(load_autoencoder("vae", str(made / "vae")).vae)
    )
    assert hash_autoencoder(random_vae(seed=1)) != hash_autoencoder(vae)
    assert hash_autoencoder(random_vae(scaling_factor=0.5)) != hash_autoencoder(vae)


def test_latents_of_an_autoencoder_with_another_decoder(made):
    """As `train_autoencoder.py --decoder_only` leaves it: the latents are the same."""
    stored = StoredLatents.read(made / "stored")

    def check(part, stored=stored):
        vae = load_autoencoder("vae", str(made / "vae")).vae
        next(getattr(vae, part).parameters()).data.add_(0.5)
        stored.check(LatentSpace(vae), hash_autoencoder(vae), "folder")

    check("decoder")
    check("post_quant_conv")
    for part in ("encoder", "quant_conv"):
        with pytest.raises(ValueError, match="are those of another autoencoder"):
            check(part)
    with pytest.raises(ValueError, match="are those of another autoencoder"):  # of an earlier version
        check("decoder", dataclasses.replace(stored, encoder=None))


def test_an_autoencoder_of_a_pipeline(made, tmp_path):
    shutil.copytree(made / "vae", tmp_path / "vae")
    (tmp_path / "model_index.json").write_text("{}")
    vae, image_format = load_autoencoder("vae", str(tmp_path))
    assert hash_autoencoder(vae) == StoredLatents.read(made / "stored").autoencoder
    assert image_format == ImageFormat()
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    assert not vae.training
    # Pipelines keep the format in their own config; saving one leaves the autoencoder's record out.
    Path(tmp_path, "vae", "autoencoder.json").unlink()
    assert load_autoencoder("vae", str(tmp_path)).image_format is None
    recorded = ImageFormat(value_range=(0, 4095), num_levels=4096)
    (tmp_path / "model_index.json").write_text(json.dumps({"image_format": recorded.to_config()}))
    assert load_autoencoder("vae", str(tmp_path)).image_format == recorded
    assert load_autoencoder("vae", str(tmp_path / "vae")).image_format is None
