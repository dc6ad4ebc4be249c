"""Image embeddings in a column next to images and to latents: mirrored with their images, and checked."""

import math

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from runs import flags
from tiny_autoencoders import save_vae
from tolerances import NETWORK, rounding_errors
from toy_clips import CLIP_WIDTH, save_clip

from diffusers_adm.conditioning.image_format import ImageFormat
from diffusers_adm.data import encode_embeddings, encode_latents
from diffusers_adm.data.clip_models import load_clip_vision
from diffusers_adm.data.columns import load_image_dataset
from diffusers_adm.data.embeddings import check_embeddings, embedding_columns, embedding_columns_in_errors
from diffusers_adm.data.images import ImageDataset
from diffusers_adm.data.latents import LatentDataset, StoredLatents, check_latents, load_latents


COUNT, SIZE = 6, 8


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Images with captions, the embeddings of a CLIP, also of the mirrored images, and latents next to these."""
    folder = tmp_path_factory.mktemp("embeddings")
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, SIZE, SIZE, 3), dtype=np.uint8)
    columns = {"image": [Image.fromarray(values) for values in pixels], "text": [f"image {i}" for i in range(COUNT)]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, features).to_parquet(folder / "images.parquet")
    save_clip(folder / "clip")
    save_vae(folder / "vae", image_format=ImageFormat())
    given = {"clip": folder / "clip", "data_files": folder / "images.parquet", "output_dir": folder / "embeddings"}
    encode_embeddings.main(flags(**given, random_flip=True, caption_column="text"))
    encode(folder, folder / "latents", random_flip=True)
    return folder


def encode(folder, output, **arguments):
    given = {"vae": folder / "vae", "data_files": files_of(folder), "resolution": SIZE, "dtype": "float32"}
    given |= {"caption_column": "text", "image_embeds_column": "image_embeds", "output_dir": output}
    encode_latents.main(flags(**given | arguments))


def files_of(made):
    return [str(path) for path in sorted((made / "embeddings").glob("*.parquet"))]


def images_of(made, random_flip=True):
    columns = embedding_columns("image_embeds", random_flip)
    return load_image_dataset(data_files=files_of(made), caption_column="text", tensor_columns=columns)[0]


class TestExamples:
    def test_the_embedding_is_that_of_the_image_as_it_is_shown(self, made):
        dataset = ImageDataset(images_of(made), SIZE, random_flip=True, seed=3, image_format=ImageFormat())
        vision = load_clip_vision("clip", str(made / "clip"))
        assert dataset.tensor_columns == ["image_embeds"]
        mirrored = 0
        for epoch in range(4):
            dataset.set_epoch(epoch)
            for index in range(COUNT):
                example = dataset[index]
                shown = ((example["images"] / 2 + 0.5) * 255).round().byte().permute(1, 2, 0).numpy()
                expected = vision.embed(vision.pixel_values(Image.fromarray(shown)))[0]
                assert rounding_errors(example["image_embeds"], expected) <= NETWORK
                assert "image_embeds_flipped" not in example
                plain = torch.tensor(dataset.dataset[index]["image_embeds"])
                mirrored += not torch.equal(example["image_embeds"], plain)
        assert 0 < mirrored < 4 * COUNT

    def test_without_flips_there_is_one(self, made):
        dataset = ImageDataset(images_of(made, random_flip=False), SIZE, image_format=ImageFormat())
        for index in range(COUNT):
            plain = torch.tensor(dataset.dataset[index]["image_embeds"])
            assert torch.equal(dataset[index]["image_embeds"], plain)

    def test_latents_keep_them(self, made):
        stored = StoredLatents.read(made / "latents")
        assert (stored.image_embeds_column, stored.random_flip) == ("image_embeds", True)
        columns = embedding_columns("image_embeds", True)
        rows, _ = load_latents(str(made / "latents"), stored, caption_column="text", tensor_columns=columns)
        assert check_embeddings(rows, columns) == CLIP_WIDTH
        options = {"random_flip": True, "seed": 3}
        latents = LatentDataset(check_latents(rows, stored, "here"), SIZE, stored=stored, **options)
        images = ImageDataset(images_of(made), SIZE, image_format=ImageFormat(), **options)
        for epoch in range(3):
            latents.set_epoch(epoch)
            images.set_epoch(epoch)
            for index in range(COUNT):
                assert torch.equal(latents[index]["image_embeds"], images[index]["image_embeds"])

    def test_latents_without_flips_keep_one(self, made, tmp_path):
        encode(made, tmp_path / "latents")
        rows, _ = load_latents(str(tmp_path / "latents"), StoredLatents.read(tmp_path / "latents"))
        files = datasets.Dataset.from_parquet(str(next((tmp_path / "latents").glob("*.parquet"))))
        assert "image_embeds" in files.column_names
        assert "image_embeds_flipped" not in files.column_names
        assert "image_embeds" not in rows.column_names  # not asked for


def dataset_of(values, feature=None):
    feature = feature or datasets.List(datasets.Value("float32"))
    features = datasets.Features({"image_embeds": feature, "row": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"image_embeds": values, "row": range(10, 10 + len(values))}, features)


class TestRefusals:
    @pytest.mark.parametrize(
        ("values", "feature", "message"),
        [
            ([[1.0, 2.0], [1.0]], None, r"'clip' have different lengths, or none: 2 \(row 10\), 1 \(row 11\)"),
            ([[], []], None, "different lengths, or none"),
            (
                [[1.0], [math.nan], [math.inf]],
                None,
                "2 of 3 embeddings in the column 'clip' are NaN or inf.*: row 11, ",
            ),
            ([[1.0], None], None, "1 of 2 embeddings in the column 'clip' are missing: row 11"),
            ([[1.0], [None]], None, "1 of 2 embeddings in the column 'clip' are NaN or infinite: row 11"),
            (
                [[1], [2]],
                datasets.List(datasets.Value("int64")),
                "'clip' is of type .* are lists of floating point num",
            ),
            (["a", "b"], datasets.Value("string"), "'clip' is of type .* are lists of floating point numbers"),
        ],
    )
    def test_values(self, values, feature, message):
        with pytest.raises(ValueError, match=message):
            check_embeddings(dataset_of(values, feature), {"image_embeds": "clip"})

    def test_widths_of_mirrored_images(self):
        data = dataset_of([[1.0, 2.0]]).add_column("image_embeds_flipped", [[1.0]])
        with pytest.raises(ValueError, match="different widths: {'clip': 2, 'clip_flipped': 1}"):
            check_embeddings(data, embedding_columns("clip", True))

    def test_columns(self, made, tmp_path):
        arguments = {"data_files": files_of(made), "tensor_columns": embedding_columns("vectors", False)}
        message = "`image_embeds_column` is 'vectors', but .* has the columns image"
        with pytest.raises(ValueError, match=message), embedding_columns_in_errors():
            load_image_dataset(**arguments)
        data = datasets.Dataset.from_parquet(files_of(made)).remove_columns("image_embeds_flipped")
        data.to_parquet(tmp_path / "plain.parquet")
        with pytest.raises(
            ValueError, match="`random_flip` needs the embeddings of mirrored images, but there are none"
        ):
            encode(made, tmp_path / "latents", data_files=tmp_path / "plain.parquet", random_flip=True)
        with pytest.raises(ValueError, match="`image_embeds_column` is 'vectors', but .* has the columns"):
            encode(made, tmp_path / "latents", image_embeds_column="vectors")
