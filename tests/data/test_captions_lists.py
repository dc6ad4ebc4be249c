"""Several captions per image: one is drawn in each epoch, by the seed, the epoch and the example alone."""

import json
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from runs import SHORT_RUN, assert_same_checkpoint, flags, own_process_state, reset_accelerate
from safetensors.torch import load_file
from scripts import load_script
from tolerances import NETWORK, rounding_errors
from toy_models import TEXT_CONFIGS, TOY_CONFIG, random_text_encoder, toy_tokenizer

from diffusers_adm.data import tokenizer
from diffusers_adm.data.captions import CaptionEmbeddings, Captions, CaptionTokens
from diffusers_adm.data.columns import first_caption, load_image_dataset
from diffusers_adm.data.images import ImageDataset
from diffusers_adm.data.samplers import EpochShuffleSampler
from diffusers_adm.training import choose_examples
from diffusers_adm.training import run as training_run
from diffusers_adm.training.validation import choose_rows


LISTS = [["a cat", "the red mat"], ["a dog", "a cat", "the green hat"], [], ["the dog"], ["a hat", "a mat"]]
TEXTS = ["a cat", "", "the red dog on the mat", "a cat"]


class Texts(Captions):
    """Captions whose tensors are the numbers of their texts."""

    def distinct(self, number):
        return {"number": torch.tensor(number)}

    def drawn(self, index, seed, epoch):
        return self.texts[self.at(index, seed, epoch)["number"]]


def write_images(path, captions, type_=None, label=None):
    """One image per entry of `captions`."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in captions]
    features = {"image": datasets.Image(), "text": type_ or datasets.List(datasets.Value("string"))}
    columns = {"image": images, "text": captions}
    if label is not None:
        features["label"], columns["label"] = datasets.Value("string"), label
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(path)
    return str(path)


def load(path, **arguments):
    return load_image_dataset(data_files=path, caption_column="text", **arguments)


# 1. Reading


class TestColumn:
    @pytest.mark.parametrize("list_type", [datasets.List, datasets.LargeList])
    @pytest.mark.parametrize("text_type", ["string", "large_string"])
    def test_lists(self, tmp_path, caplog, list_type, text_type):
        captions = [[], ["a cat", None, "a mat"], None, ["", None], ["a dog"]]
        path = write_images(tmp_path / "images.parquet", captions, list_type(datasets.Value(text_type)))
        images, _ = load(path)
        assert images["caption"][:] == [[], ["a cat", "a mat"], [], [], ["a dog"]]
        assert images.features["caption"] == datasets.List(datasets.Value("string"))
        assert "3 of 6 texts in the lists of captions are missing and are left out" in caplog.text
        assert "3 of 5 captions are missing and count as empty" in caplog.text

    def test_text_stays_text(self, tmp_path):
        images, _ = load(write_images(tmp_path / "images.parquet", ["a cat", None], datasets.Value("string")))
        assert images["caption"][:] == ["a cat", ""]
        assert images.features["caption"] == datasets.Value("string")

    def test_a_folder_with_lists_in_its_metadata(self, tmp_path):
        rows = [{"file_name": f"{index}.png", "text": texts} for index, texts in enumerate(LISTS)]
        for row in rows:
            Image.new("RGB", (8, 8)).save(tmp_path / row["file_name"])
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        images, _ = load_image_dataset(train_data_dir=str(tmp_path), caption_column="text")
        found = {Path(row["image"]["path"]).name: row["caption"] for row in images}
        assert found == {row["file_name"]: row["text"] for row in rows}

    @pytest.mark.parametrize(
        ("captions", "type_", "message"),
        [
            ([[1], [2, 3]], datasets.List(datasets.Value("int64")), r"of type List\(Value\('int64'\)\), .* not text"),
            ([[["a"]]], datasets.List(datasets.List(datasets.Value("string"))), "one caption, or a list of captions"),
            ([[], None, [""]], None, "holds no caption at all"),
        ],
    )
    def test_errors(self, tmp_path, captions, type_, message):
        path = write_images(tmp_path / "images.parquet", captions, type_)
        with pytest.raises(ValueError, match=message):
            load(path)

    def test_first(self):
        assert [first_caption(caption) for caption in ("a cat", "", ["a", "b"], [])] == ["a cat", "", "a", ""]

    def test_a_tokenizer_sees_all(self, tmp_path, capsys):
        path = write_images(tmp_path / "images.parquet", LISTS)
        arguments = {"data_files": path, "vocab_size": 60, "model_max_length": 10, "output_dir": str(tmp_path / "t")}
        tokenizer.main(flags(**arguments))
        assert "from 8 captions" in capsys.readouterr().out


# 2. Drawing


class TestDraw:
    def test_each_caption_is_equally_likely(self):
        """In each epoch, and whatever the caption of the epoch before: chi-square with 8 degrees of freedom."""
        captions, number = Texts([["a", "b", "c"]] * 40), 50
        drawn = [[captions.drawn(index, 3, epoch) for epoch in range(number)] for index in range(40)]
        pairs = Counter(pair for row in drawn for pair in zip(row[:-1], row[1:], strict=True))
        pairs_of_examples = Counter(
            pair for row, other in zip(drawn, drawn[1:], strict=False) for pair in zip(row, other, strict=True)
        )
        pairs_of_seeds = Counter(
            (captions.drawn(i, 0, e), captions.drawn(i, 1, e)) for i in range(40) for e in range(50)
        )
        for counts in (pairs, pairs_of_examples, pairs_of_seeds):
            expected = counts.total() / 9
            assert sum((counts[a, b] - expected) ** 2 / expected for a in "abc" for b in "abc") < 26.1  # p = 0.001

    def test_a_repeated_caption_is_more_likely(self):
        captions = Texts([["a", "b", "a", "a"]])
        count = sum(captions.drawn(0, 0, epoch) == "a" for epoch in range(2000))
        assert abs(count - 1500) < 4 * (2000 * 3 / 16) ** 0.5

    def test_own_captions_only(self):
        captions = Texts(LISTS)
        for index, texts in enumerate(LISTS):
            assert {captions.drawn(index, 0, epoch) for epoch in range(100)} == set(texts or [""])
            assert captions[index]["number"] == captions.texts.index(first_caption(texts))
        assert captions.empty["number"] == 0
        assert captions.texts == ["", "a cat", "the red mat", "a dog", "the green hat", "the dog", "a hat", "a mat"]

    def test_single_captions_are_always_the_same(self):
        """As text and as lists of one."""
        captions, lists = Texts(TEXTS), Texts([[text] for text in TEXTS])
        for epoch in range(20):
            assert [captions.drawn(index, epoch, epoch) for index in range(4)] == TEXTS
            assert [lists.drawn(index, epoch, epoch) for index in range(4)] == TEXTS


@pytest.fixture
def encoder():
    return random_text_encoder("t5")


class TestTensors:
    def test_embeddings_are_those_of_the_drawn_text(self, tmp_path, encoder):
        words = toy_tokenizer("t5")
        tokens = CaptionTokens(LISTS, words, encoder, pad_to_max=False)
        stored = CaptionEmbeddings(tokens, encoder, str(tmp_path))
        assert len(stored.dataset) == len({text for texts in LISTS for text in texts} | {""})
        seen = set()
        for epoch in range(8):
            for index, texts in enumerate(LISTS):
                example, embedded = (source.at(index, 1, epoch) for source in (tokens, stored))
                ids = example["input_ids"][: example["caption_mask"].sum()]
                text = words.decode(ids, skip_special_tokens=True)
                assert text in (texts or [""])
                seen.add((index, text))
                expected = encoder(words([text], return_tensors="pt")["input_ids"]).last_hidden_state[0]
                assert torch.equal(embedded["caption_mask"], example["caption_mask"])
                assert rounding_errors(embedded["caption_states"][: len(expected)], expected) <= NETWORK
        assert len(seen) == sum(len(texts or [""]) for texts in LISTS)

    @pytest.mark.parametrize("persistent", [False, True])
    def test_any_number_of_workers_gives_the_same(self, tmp_path, encoder, persistent):
        images, _ = load(write_images(tmp_path / "images.parquet", LISTS * 2))
        tokens = CaptionTokens(images["caption"][:], toy_tokenizer("t5"), encoder, pad_to_max=False)

        def epochs(num_workers):
            dataset = ImageDataset(images, 8, random_flip=True, seed=5, captions=tokens)
            loader = torch.utils.data.DataLoader(
                dataset,
                batch_size=4,
                sampler=EpochShuffleSampler(dataset),
                num_workers=num_workers,
                persistent_workers=persistent and num_workers > 0,
            )
            for epoch in range(3):
                dataset.set_epoch(epoch)
                yield from loader

        alone, workers = list(epochs(0)), list(epochs(2))
        assert len(alone) == len(workers) == 9
        for a, b in zip(alone, workers, strict=True):
            assert a.keys() == b.keys() >= {"images", "input_ids", "caption_mask"}
            assert all(torch.equal(a[name], b[name]) for name in a)

    def test_crops_and_flips_do_not_depend_on_the_captions(self, tmp_path, encoder):
        images, _ = load(write_images(tmp_path / "images.parquet", LISTS))
        tokens = CaptionTokens(images["caption"][:], toy_tokenizer("t5"), encoder, pad_to_max=False)
        with_captions, without = (
            ImageDataset(images, 7, random_flip=True, captions=captions) for captions in (tokens, None)
        )
        for first, second in zip(with_captions, without, strict=True):
            assert torch.equal(first["images"], second["images"])


# 3. Training and validation


class TestValidation:
    def rows(self, tmp_path, prompts=None, label=("x", "y", "x", "y", "x")):
        images, id2label = load(
            write_images(tmp_path / "images.parquet", LISTS, label=list(label)), label_column="label"
        )
        return images, choose_rows(images, id2label, 7, prompts)

    def test_the_first_captions_are_shown(self, tmp_path):
        images, rows = self.rows(tmp_path)
        assert [prompt for prompt, _ in rows] == ["a cat", "a dog", "the dog", "a hat"]
        assert [arguments["class_labels"] for _, arguments in rows] == [0, 1, 1, 0]
        examples = choose_examples(ImageDataset(images, 8), 5)
        assert [arguments["prompt"] for _, arguments in examples] == ["a cat", "a dog", "", "the dog", "a hat"]

    def test_classes_of_prompts(self, tmp_path):
        """Of the image that is called so first, else of the first that is called so at all, else none."""
        lists = [["a mat", "a hat"], ["a hat"], ["a dog", "the cat"]]
        images, id2label = load(
            write_images(tmp_path / "images.parquet", lists, label=["x", "y", "y"]), label_column="label"
        )
        rows = choose_rows(images, id2label, 7, ["a hat", "the cat", "a mat", "a fish"])
        assert [arguments["class_labels"] for _, arguments in rows] == [1, 1, 0, 7]


class TestRuns:
    @pytest.fixture(autouse=True)
    def own_state(self, monkeypatch):
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        monkeypatch.setattr(training_run, "plot_loss_curves", lambda *args: None)
        with own_process_state("train_adm"):
            yield

    def test_a_resumed_run_draws_what_an_unbroken_one_does(self, tmp_path):
        (tmp_path / "unet.json").write_text(json.dumps(TOY_CONFIG | TEXT_CONFIGS["added_kv"]))
        random_text_encoder("t5").save_pretrained(tmp_path / "text" / "text_encoder")
        toy_tokenizer("t5").save_pretrained(tmp_path / "text" / "tokenizer")
        arguments = SHORT_RUN | {
            "model_config_name_or_path": str(tmp_path / "unet.json"),
            "data_files": write_images(tmp_path / "lists.parquet", LISTS * 2),
            "caption_column": "text",
            "text_encoder_name_or_path": str(tmp_path / "text"),
            "max_train_steps": 6,
            "train_batch_size": 3,  # so that a checkpoint is in the middle of an epoch
            "checkpointing_steps": 2,
            "learning_rate": 1e-3,
        }

        def train(name, **changes):
            reset_accelerate()
            train_adm = load_script("train_adm")
            train_adm.main(flags(**arguments | {"output_dir": str(tmp_path / name)} | changes))
            return tmp_path / name / "checkpoint-6"

        unbroken = train("unbroken")
        resumed = train("resumed", resume_from_checkpoint=str(tmp_path / "unbroken" / "checkpoint-2"))
        assert_same_checkpoint(unbroken, resumed)
        # The captions of later epochs matter: with the first ones alone, the run is another one.
        firsts = [first_caption(texts) for texts in LISTS] * 2
        path = write_images(tmp_path / "firsts.parquet", firsts, datasets.Value("string"))
        folders = unbroken, train("firsts", data_files=path)
        drawn, first = (load_file(folder / "model.safetensors") for folder in folders)
        assert [name for name in drawn if not torch.equal(drawn[name], first[name])]
