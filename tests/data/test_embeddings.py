"""Embeddings of a CLIP as data: what `encode_embeddings` stores, reading it back, its damage, and the examples."""

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image, ImageOps
from runs import EMOJI
from tolerances import NETWORK, rounding_errors
from toy_clips import CLIP_WIDTH, clip_processor, random_clip, save_clip
from toy_embeddings import save_embeddings, write_emoji_captions
from toy_models import random_text_encoder, toy_tokenizer
from transformers import CLIPModel, CLIPTextModelWithProjection, CLIPVisionModel, CLIPVisionModelWithProjection

from diffusers_adm.conditioning.text import encode_captions, stored_conditioning
from diffusers_adm.data.captions import CaptionEmbeddings, CaptionTokens
from diffusers_adm.data.clip_models import hash_clip_vision, load_clip_text, load_clip_vision
from diffusers_adm.data.columns import load_image_dataset
from diffusers_adm.data.embeddings import EmbeddingDataset, StoredEmbeddings, load_embeddings
from diffusers_adm.data.images import ImageDataset


COUNT = 30


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with images that have lists of captions and classes, a CLIP, and embeddings with flips in four files."""
    folder = tmp_path_factory.mktemp("embeddings")
    write_emoji_captions(folder / "images.parquet", EMOJI, COUNT)
    save_clip(folder / "clip")
    save_embeddings(
        folder / "stored",
        folder / "clip",
        folder / "images.parquet",
        random_flip=True,
        shard_size=8,
        batch_size=3,
        caption_column="captions",
        label_column="label",
    )
    return folder


def read(folder, caption_column="captions", **arguments):
    stored = StoredEmbeddings.read("train_data_dir", str(folder))
    return stored, load_embeddings(str(folder), stored, caption_column, **arguments)


def images_of(path):
    return datasets.load_dataset("parquet", data_files=str(path), split="train")


def expected_embeddings(images, clip=None):
    """By transformers' `CLIPModel`, one image at a time, without this package."""
    clip, processor = clip or random_clip(), clip_processor()
    with torch.no_grad():
        pixels = [processor(image.convert("RGB"), return_tensors="pt")["pixel_values"] for image in images]
        pooled = [clip.vision_model(pixel_values=values).pooler_output for values in pixels]
        return torch.cat([clip.visual_projection(value) for value in pooled])


class TestStoring:
    def test_values_are_those_of_the_clip(self, made):
        images = images_of(made / "images.parquet")["image"][:]
        _, data = read(made / "stored")
        for column, shown in (("image_embeds", images), ("image_embeds_flipped", map(ImageOps.mirror, images))):
            assert rounding_errors(torch.tensor(data[column][:]), expected_embeddings(shown)) <= NETWORK
        assert not np.allclose(data["image_embeds"][:], data["image_embeds_flipped"][:], atol=0.01)

    def test_all_columns_are_kept(self, made):
        before = images_of(made / "images.parquet")
        files = sorted((made / "stored").glob("embeddings-*-of-00004.parquet"))
        assert len(files) == 4
        after = datasets.load_dataset("parquet", data_files=[*map(str, files)], split="train")
        assert set(after.column_names) - set(before.column_names) == {"image_embeds", "image_embeds_flipped"}
        assert {name: after.features[name] for name in before.column_names} == before.features
        for name in ("text", "label", "captions"):
            assert after[name][:] == before[name][:]
        for one, other in zip(after["image"][:], before["image"][:], strict=True):
            assert one.tobytes() == other.tobytes()

    def test_record(self, made):
        stored = StoredEmbeddings.read("train_data_dir", str(made / "stored"))
        assert (stored.width, stored.num_images, stored.random_flip, stored.image_column) == (16, COUNT, True, "image")
        assert stored.fingerprint == hash_clip_vision(load_clip_vision("clip", str(made / "clip")))

    def test_a_folder_of_images(self, made, tmp_path):
        """Files of several sizes and modes, with captions next to them; their content is in the parquet files."""
        images = [Image.new("RGBA", (9, 12), (255, 0, 0, 0)), Image.new("L", (30, 20), 77), Image.new("RGB", (8, 8))]
        (tmp_path / "images").mkdir()
        for index, image in enumerate(images):
            image.save(tmp_path / "images" / f"{index}.png")
            (tmp_path / "images" / f"{index}.txt").write_text(f"caption {index}")
        (tmp_path / "images" / "broken.png").write_bytes(b"no image")
        folder = save_embeddings(
            tmp_path / "out", made / "clip", None, train_data_dir=tmp_path / "images", caption_column="text"
        )
        shutil.rmtree(tmp_path / "images")
        stored, data = read(folder, "text")
        assert data["caption"][:] == ["caption 0", "caption 1", "caption 2"]
        assert (stored.num_images, stored.random_flip, stored.columns) == (3, False, ("image_embeds",))
        white = Image.new("RGB", (9, 12), (255, 255, 255))  # behind what is transparent
        expected = expected_embeddings([white, *images[1:]])
        assert rounding_errors(torch.tensor(data["image_embeds"][:]), expected) <= NETWORK
        kept = datasets.load_dataset("parquet", data_files=f"{folder}/*.parquet", split="train")["image"][:]
        assert [image.size for image in kept] == [image.size for image in images]

    def test_parquet_files_train_a_decoder(self, made):
        """The columns that `ImageDataset` reads, mirrored with the image."""
        columns = {"image_embeds": "image_embeds", "image_embeds_flipped": "image_embeds_flipped"}
        files = sorted(map(str, (made / "stored").glob("*.parquet")))
        images, _ = load_image_dataset(data_files=files, tensor_columns=columns)
        example = ImageDataset(images, 8)[3]
        assert torch.equal(example["image_embeds"], torch.tensor(read(made / "stored")[1][3]["image_embeds"]))

    def test_nothing_is_there_before_all_is(self, made, tmp_path, monkeypatch):
        """A run that is killed leaves no folder of this name, and the next one starts anew."""

        def fail(self, folder):
            raise KeyboardInterrupt

        write = StoredEmbeddings.write
        monkeypatch.setattr(StoredEmbeddings, "write", fail)
        with pytest.raises(KeyboardInterrupt):
            save_embeddings(tmp_path / "out", made / "clip", made / "images.parquet", shard_size=5)
        assert not (tmp_path / "out").exists()
        monkeypatch.setattr(StoredEmbeddings, "write", write)
        save_embeddings(tmp_path / "out", made / "clip", made / "images.parquet")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
        assert len(list((tmp_path / "out").glob("*.parquet"))) == 1

    def test_workers_give_the_same(self, made, tmp_path):
        folder = save_embeddings(
            tmp_path / "out", made / "clip", made / "images.parquet", num_workers=2, batch_size=3, random_flip=True
        )
        one, other = (read(place)[1]["image_embeds_flipped"][:] for place in (folder, made / "stored"))
        assert rounding_errors(torch.tensor(one), torch.tensor(other)) <= NETWORK


class TestClip:
    def test_fingerprints(self, made, tmp_path):
        """They depend on what embeddings depend on, and not on where and how the CLIP was saved."""
        known = hash_clip_vision(load_clip_vision("clip", str(made / "clip")))
        tower = load_clip_vision("clip", str(made / "clip"))
        tower.model.save_pretrained(tmp_path / "tower" / "image_encoder")
        tower.processor.save_pretrained(tmp_path / "tower" / "feature_extractor")
        assert hash_clip_vision(load_clip_vision("clip", str(tmp_path / "tower"))) == known
        text = random_clip()
        text.text_projection.weight.data += 1
        save_clip(tmp_path / "text", text)
        assert hash_clip_vision(load_clip_vision("clip", str(tmp_path / "text"))) == known
        vision = random_clip()
        vision.visual_projection.weight.data[0, 0] += 1e-3
        save_clip(tmp_path / "vision", vision)
        save_clip(tmp_path / "mean", image_mean=[0.5, 0.5, 0.5])
        for name in ("vision", "mean"):
            assert hash_clip_vision(load_clip_vision("clip", str(tmp_path / name))) != known

    def test_towers_are_those_of_the_clip(self, made):
        """Also where the whole config has another `projection_dim` than the towers' own, which `CLIPModel` ignores."""
        clip = CLIPModel.from_pretrained(made / "clip")
        assert clip.config.vision_config.projection_dim != clip.config.projection_dim == CLIP_WIDTH
        text = load_clip_text("clip", str(made / "clip"))
        ids = torch.tensor([[1, 5, 6, 0, 0], [1, 7, 0, 0, 0]])
        with torch.no_grad():
            output = text.model(ids)
            expected = clip.text_model(ids)
            projected = clip.text_projection(expected.pooler_output)
        assert rounding_errors(output.text_embeds, projected) <= NETWORK
        assert rounding_errors(output.last_hidden_state, expected.last_hidden_state) <= NETWORK
        assert text.tokenizer.get_vocab() == toy_tokenizer().get_vocab()
        assert not any(parameter.requires_grad for parameter in text.model.parameters())

    def test_what_is_no_clip(self, made, tmp_path):
        vision = load_clip_vision("clip", str(made / "clip")).model
        CLIPVisionModel.from_pretrained(made / "clip").save_pretrained(tmp_path / "unprojected")
        with pytest.raises(ValueError, match="`clip` .*unprojected' holds no weights of the vision tower's projection"):
            load_clip_vision("clip", str(tmp_path / "unprojected"))
        random_text_encoder("bert").save_pretrained(tmp_path / "bert")
        with pytest.raises(ValueError, match="holds a model of type 'bert', not a CLIP with a vision tower"):
            load_clip_vision("clip", str(tmp_path / "bert"))
        load_clip_text("clip", str(made / "clip")).model.save_pretrained(tmp_path / "text")
        with pytest.raises(ValueError, match="holds a model of type 'clip_text_model', not a CLIP with a vision"):
            load_clip_vision("clip", str(tmp_path / "text"))
        vision.save_pretrained(tmp_path / "vision")
        with pytest.raises(ValueError, match="holds no `preprocessor_config.json`, so it is not known how"):
            load_clip_vision("clip", str(tmp_path / "vision"))
        with pytest.raises(ValueError, match="not a CLIP with a text tower"):
            load_clip_text("clip", str(tmp_path / "vision"))
        with pytest.raises(ValueError, match="neither its folder `tokenizer` nor its root holds a tokenizer"):
            load_clip_text("clip", str(tmp_path / "text"))
        with pytest.raises(ValueError, match="config.json', which is a file"):
            load_clip_vision("clip", str(made / "clip" / "config.json"))
        (tmp_path / "other").mkdir()
        with pytest.raises(ValueError, match="`clip` is .*other', which holds no config of a CLIP. Name a folder"):
            load_clip_vision("clip", str(tmp_path / "other"))
        with pytest.raises(ValueError, match="`clip` is 'nowhere', which is no file or folder here and"):
            load_clip_vision("clip", "nowhere")
        broken = random_clip()
        broken.vision_model.post_layernorm.bias.data[0] = torch.nan
        with pytest.raises(ValueError, match="Weights of `clip` are not finite.*post_layernorm"):
            load_clip_vision("clip", save_clip(tmp_path / "nan", broken))

    def test_saved_towers_load_with_transformers(self, made, tmp_path):
        vision, text = load_clip_vision("clip", str(made / "clip")), load_clip_text("clip", str(made / "clip"))
        vision.model.save_pretrained(tmp_path / "vision")
        text.model.save_pretrained(tmp_path / "text")
        assert CLIPVisionModelWithProjection.from_pretrained(tmp_path / "vision").config.projection_dim == CLIP_WIDTH
        assert CLIPTextModelWithProjection.from_pretrained(tmp_path / "text").config.projection_dim == CLIP_WIDTH


class TestRefusals:
    def test_nan_is_named_by_image(self, made, tmp_path):
        clip = random_clip()
        clip.visual_projection.weight.data.fill_(3e38)  # finite, and overflows
        clip.vision_model.post_layernorm.bias.data += 10
        with pytest.raises(ValueError, match="encodes row 0 .*, row 1 .* to NaN or infinite values"):
            save_embeddings(tmp_path / "out", save_clip(tmp_path / "clip", clip), made / "images.parquet", batch_size=2)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"clip": "nowhere"}, "`clip` is 'nowhere', which is no file or folder"),
            ({"image_column": "picture"}, "`image_column` is 'picture', but .* has the columns"),
            ({"caption_column": "label"}, "`caption_column` 'label' of .* is of type .*, which is not text"),
            ({"data_files": None}, "Got no data source"),
            ({"batch_size": 0}, "`batch_size` is 0; it must be at least 1"),
        ],
    )
    def test_arguments(self, made, tmp_path, arguments, message):
        given = {"clip": made / "clip", "data_files": made / "images.parquet"} | arguments
        with pytest.raises(ValueError, match=message):
            save_embeddings(tmp_path / "out", **given)
        assert not (tmp_path / "out").exists()

    def test_data_that_has_embeddings_already(self, made, tmp_path):
        files = sorted(map(str, (made / "stored").glob("*.parquet")))
        with pytest.raises(ValueError, match="has a column 'image_embeds' already. Rename it"):
            save_embeddings(tmp_path / "out", made / "clip", files)
        with pytest.raises(ValueError, match="is not empty"):
            save_embeddings(made / "stored", made / "clip", made / "images.parquet")

    def test_folders_of_embeddings_are_no_folders_of_images(self, made):
        with pytest.raises(
            ValueError, match=r"holds embeddings .* in parquet files. Pass these instead: `--data_files"
        ):
            load_image_dataset(train_data_dir=str(made / "stored"))

    def test_damaged_folders(self, made, tmp_path):
        def copy(name):
            return shutil.copytree(made / "stored", tmp_path / name)

        folder = copy("lost")
        (folder / "embeddings-00001-of-00004.parquet").unlink()
        with pytest.raises(ValueError, match=f"holds {COUNT - 8} rows, but {COUNT} were written"):
            read(folder)
        folder = copy("other width")
        record = json.loads((folder / "embeddings.json").read_text())
        (folder / "embeddings.json").write_text(json.dumps(record | {"width": 12}))
        with pytest.raises(ValueError, match="holds 16 numbers of type float32 .* embeddings.json says 12 of float32"):
            read(folder)
        (folder / "embeddings.json").write_text(json.dumps(record | {"version": 9}))
        with pytest.raises(ValueError, match="is of version 9"):
            read(folder)
        (folder / "embeddings.json").write_text("{}")
        with pytest.raises(ValueError, match="cannot be read: KeyError"):
            read(folder)
        (folder / "embeddings.json").unlink()
        with pytest.raises(ValueError, match="`train_data_dir` is .* which holds no embeddings.json"):
            read(folder)
        with pytest.raises(ValueError, match="`caption_column` is 'words', but .* has the columns"):
            read(made / "stored", "words")

    @pytest.mark.parametrize("value", [np.nan, -np.inf])
    def test_values_that_are_not_finite(self, made, tmp_path, value):
        folder = Path(shutil.copytree(made / "stored", tmp_path / "damaged"))
        path = folder / "embeddings-00001-of-00004.parquet"  # rows 8 to 15
        table = pyarrow.parquet.read_table(path)
        rows = table.column("image_embeds_flipped").to_pylist()
        rows[1][5] = value
        position, field = table.column_names.index("image_embeds_flipped"), table.schema.field("image_embeds_flipped")
        pyarrow.parquet.write_table(table.set_column(position, field, pyarrow.array([*rows], field.type)), path)
        message = (
            f"1 of {COUNT} embeddings in the column 'image_embeds_flipped' of .*damaged are NaN or infinite: row 9"
        )
        with pytest.raises(ValueError, match=message):
            read(folder)

    def test_another_clip(self, made):
        stored = StoredEmbeddings.read("train_data_dir", str(made / "stored"))
        stored.check(stored.fingerprint, "same", "here")
        with pytest.raises(
            ValueError, match=f"here are those of another CLIP, {stored.clip}, .*that of `clip` 'other'"
        ):
            stored.check("0123", "other", "here")


class TestDataset:
    def test_examples(self, made):
        """Embeddings of mirrored images for the examples that `ImageDataset` mirrors; a caption of the list."""
        stored, data = read(made / "stored")
        tokens = CaptionTokens(data["caption"][:], toy_tokenizer(), random_text_encoder(), pad_to_max=True)
        dataset = EmbeddingDataset(data, stored, tokens, random_flip=True, seed=3)
        images = ImageDataset(
            load_image_dataset(data_files=str(made / "images.parquet"))[0], 32, random_flip=True, seed=3
        )
        plain = ImageDataset(load_image_dataset(data_files=str(made / "images.parquet"))[0], 32, seed=3)
        flipped, captions = set(), {}
        for epoch in (0, 1, 2):
            dataset.set_epoch(epoch)
            images.set_epoch(epoch)
            for index in range(len(dataset)):
                is_flipped = not torch.equal(images[index]["images"], plain[index]["images"])
                column = "image_embeds_flipped" if is_flipped else "image_embeds"
                example = dataset[index]
                flipped.add(is_flipped)
                assert torch.equal(example["image_embeds"], torch.tensor(data[index][column]))
                assert example["image_embeds"].dtype == torch.float32
                captions.setdefault(index, set()).add(tuple(example["input_ids"].tolist()))
        assert flipped == {True, False}
        for index, drawn in captions.items():
            texts = data[index]["caption"] or [""]
            ids = toy_tokenizer()(list(texts), padding="max_length", max_length=12)["input_ids"]
            assert drawn <= {*map(tuple, ids)}
        assert max(map(len, captions.values())) == 2

    def test_a_subset_and_workers(self, made):
        stored, data = read(made / "stored", max_samples=7, seed=1)
        dataset = EmbeddingDataset(data, stored)
        loader = torch.utils.data.DataLoader(dataset, batch_size=3, num_workers=2)
        found = torch.cat([batch["image_embeds"] for batch in loader])
        _, whole = read(made / "stored")
        assert torch.equal(found, torch.tensor(whole["image_embeds"][:])[torch.tensor(data["row"][:])])
        assert dataset.width == CLIP_WIDTH
        with pytest.raises(IndexError, match="7 is out of range for 7"):
            dataset[7]

    def test_flips_that_are_not_stored(self, made, tmp_path):
        folder = save_embeddings(tmp_path / "out", made / "clip", made / "images.parquet")
        stored, data = read(folder)
        with pytest.raises(ValueError, match="`random_flip` needs the embeddings of mirrored images"):
            EmbeddingDataset(data, stored, random_flip=True)


def test_stored_captions_with_masked_padding(made, tmp_path):
    """The mask of the tokens, their states and the text embedding, as encoding them anew gives them."""
    text = load_clip_text("clip", str(made / "clip"))
    tokens = CaptionTokens(["a red cat", "", ["the dog", "a"]], text.tokenizer, text.model, pad_to_max=True)
    stored = CaptionEmbeddings(tokens, text.model, str(tmp_path), masks_padding=True)
    for number in range(len(tokens.texts)):
        batch = {name: value[None] for name, value in tokens.distinct(number).items()}
        with torch.no_grad():
            expected = encode_captions(text.model, batch, pad_to_max=True, masks_padding=True)
        found = stored_conditioning({name: value[None] for name, value in stored.distinct(number).items()})
        mask = expected.attention_mask.bool()
        assert 2 <= mask.sum() < 12
        assert torch.equal(found.attention_mask, expected.attention_mask)
        assert rounding_errors(found.hidden_states[mask], expected.hidden_states[mask]) <= NETWORK
        assert not found.hidden_states[~mask].any()
        assert rounding_errors(found.pooled, expected.pooled) <= NETWORK
    unmasked = CaptionEmbeddings(tokens, text.model, str(tmp_path))  # another file
    assert "caption_mask" not in unmasked[0]
    assert unmasked[0]["caption_states"].any(dim=1).all()
