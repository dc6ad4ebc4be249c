"""
The embedded emoji sets (`data/noto-emoji-32/`, `-64/`, `data/twemoji-64/`) and the keywords of emoji
(`data/emoji-keywords/`), and the scripts that made them.
"""

import importlib.util
import io
import json
import re
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Features, Image, List, Value, load_dataset
from PIL import Image as PILImage


DATA = Path(__file__).parents[1] / "data"
FOLDER = DATA / "noto-emoji-32"
CATEGORIES = [
    "Activities",
    "Animals & Nature",
    "Flags",
    "Food & Drink",
    "Objects",
    "People & Body",
    "Smileys & Emotion",
    "Symbols",
    "Travel & Places",
]


@pytest.fixture(scope="module")
def emoji():
    return load_dataset("parquet", data_files={split: str(FOLDER / f"{split}.parquet") for split in ("train", "test")})


def load_module(name):
    spec = importlib.util.spec_from_file_location(name, DATA / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script():
    return load_module("make_emoji")


@pytest.fixture(scope="module")
def keywords_script():
    return load_module("emoji_keywords")


class TestEmbeddedSet:
    @pytest.mark.parametrize(("split", "rows"), [("train", 3618), ("test", 163)])
    def test_features_and_size(self, emoji, split, rows):
        assert emoji[split].num_rows == rows
        assert emoji[split].features == Features(
            {"image": Image(), "text": Value("string"), "label": ClassLabel(names=CATEGORIES)}
        )

    @pytest.mark.parametrize("split", ["train", "test"])
    def test_every_row_is_usable(self, emoji, split):
        for row in emoji[split]:
            assert (row["image"].format, row["image"].mode, row["image"].size) == ("PNG", "RGB", (32, 32)), row["text"]
            assert row["text"], row
            assert 0 <= row["label"] < len(CATEGORIES), row["text"]
            low, high = np.asarray(row["image"]).min(), np.asarray(row["image"]).max()
            assert low < high, f"{row['text']} is a blank square"

    def test_colours_and_background(self, emoji):
        """Channels in RGB order, on white: seen from pictures whose colours their names tell."""
        texts = emoji["train"]["text"]
        for text, channel in (("red apple", 0), ("green heart", 1), ("blue heart", 2)):
            image = np.asarray(emoji["train"][list(texts).index(text)]["image"])
            assert image[14:18, 14:18].mean((0, 1)).argmax() == channel, text
            assert (image[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all(), text

    def test_is_small(self):
        assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 8e6

    def test_readme_counts(self, emoji):
        """The table in the README beside the files."""
        rows = re.findall(r"^\| (\d) \| ([^|]+?) \| (\d+) \| (\d+) \|$", (FOLDER / "README.md").read_text(), re.M)
        train, test = (Counter(emoji[split]["label"]) for split in ("train", "test"))
        assert [(int(i), name, int(a), int(b)) for i, name, a, b in rows] == [
            (i, name, train[i], test[i]) for i, name in enumerate(CATEGORIES)
        ]


class TestLargerSet:
    """The same emoji, in the same order, with four pixels for each of the smaller set."""

    @pytest.mark.parametrize("split", ["train", "test"])
    def test_its_block_means_are_the_smaller_set(self, emoji, split):
        path = str(DATA / "noto-emoji-64" / f"{split}.parquet")
        larger = load_dataset("parquet", data_files={split: path})[split]
        assert larger.features == emoji[split].features
        for name in ("text", "label"):
            assert list(larger[name]) == list(emoji[split][name])
        for row, halved in zip(larger, emoji[split], strict=True):
            pixels = np.asarray(row["image"]).astype(np.int64)
            assert pixels.shape == (64, 64, 3)
            sums = pixels.reshape(32, 2, 32, 2, 3).sum((1, 3))
            np.testing.assert_array_equal((sums + 2) // 4, np.asarray(halved["image"]), err_msg=row["text"])


class TestSecondStyle:
    """A few of the same emoji by other hands, each with one word."""

    def test_words_and_images(self, emoji, script):
        chosen = load_dataset("parquet", data_files=str(DATA / "twemoji-64" / "train.parquet"))["train"]
        assert chosen.features == emoji["train"].features
        lines = (DATA / "familiar.txt").read_text().splitlines()
        pairs = script.choose(list(emoji["train"]["text"]), lines)
        assert [word for _, word in pairs] == list(chosen["text"])
        for (row, _), example in zip(pairs, chosen, strict=True):
            other = emoji["train"][row]
            assert (example["image"].mode, example["image"].size) == ("RGB", (64, 64))
            assert example["label"] == other["label"], example["text"]
            difference = np.asarray(example["image"].reduce(2), np.float64) - np.asarray(other["image"], np.float64)
            # Another image of the same thing; of 255, other pairs of emoji differ by 97 in the median.
            assert 5 < np.sqrt((difference**2).mean()) < 110, example["text"]

    def test_a_name_that_the_set_does_not_have(self, script):
        assert script.choose(["a", "b"], ["# names", "", "b, two"]) == [(1, "two")]
        with pytest.raises(ValueError, match="the set has no emoji 'c'"):
            script.choose(["a", "b"], ["c, three"])


def png(pixels: np.ndarray, **save) -> bytes:
    file = io.BytesIO()
    PILImage.fromarray(pixels).save(file, format="PNG", **save)
    return file.getvalue()


@pytest.fixture
def pixels() -> np.ndarray:
    """64x64 RGB whose 2x2 means are known: red rises by 4 a column, green by 4 a row, blue is a board of 0 and 1."""
    y, x = np.mgrid[:64, :64]
    return np.stack([4 * x, 4 * y, (x + y) % 2], axis=-1).astype(np.uint8)


@pytest.fixture
def source(pixels, tmp_path) -> Path:
    features = Features(
        {
            "image": Image(),
            "text": Value("string"),
            "label": ClassLabel(names=["left", "right"]),
            "unified": Value("string"),
        }
    )
    images = [{"bytes": png(p), "path": f"{i}.png"} for i, p in enumerate((pixels, pixels[::-1].copy()))]
    columns = [
        pa.array(images, type=features["image"].pa_type),
        pa.array(["up", "down"]),
        pa.array([1, 0]),
        pa.array(["A", "B"]),
    ]
    pq.write_table(pa.table(columns, schema=features.arrow_schema), tmp_path / "source.parquet")
    return tmp_path / "source.parquet"


class TestScript:
    def test_area_average(self, script, source, tmp_path):
        assert script.convert(source, tmp_path / "target.parquet") == 2
        target = load_dataset("parquet", data_files=str(tmp_path / "target.parquet"), cache_dir=str(tmp_path))["train"]

        y, x = np.mgrid[:32, :32]
        # Columns 2x and 2x+1 hold 8x and 8x+4: mean 8x+2. The board's mean is one half, which is rounded up.
        expected = np.stack([8 * x + 2, 8 * y + 2, np.ones_like(x)], axis=-1)
        np.testing.assert_array_equal(np.asarray(target[0]["image"]), expected)
        np.testing.assert_array_equal(np.asarray(target[1]["image"]), expected[::-1])

    def test_same_size_is_lossless(self, script, source, pixels, tmp_path):
        assert script.convert(source, tmp_path / "target.parquet", size=64) == 2
        target = load_dataset("parquet", data_files=str(tmp_path / "target.parquet"), cache_dir=str(tmp_path))["train"]
        assert target[0]["image"].format == "WEBP"
        np.testing.assert_array_equal(np.asarray(target[0]["image"]), pixels)

    def test_keeps_three_columns_and_the_label_names(self, script, source, tmp_path):
        script.convert(source, tmp_path / "target.parquet")
        target = load_dataset("parquet", data_files=str(tmp_path / "target.parquet"), cache_dir=str(tmp_path))["train"]
        assert target.features == Features(
            {"image": Image(), "text": Value("string"), "label": ClassLabel(names=["left", "right"])}
        )
        assert list(target["text"]) == ["up", "down"]
        assert list(target["label"]) == [1, 0]

    def test_picks_as_many_of_each_class(self, script):
        labels = [0] * 5 + [1] * 50 + [2] * 20 + [0] * 3
        picked = script.pick(labels, 8)
        assert picked == sorted(set(picked))
        assert Counter(labels[i] for i in picked) == {0: 8, 1: 8, 2: 8}
        assert [i for i in picked if labels[i] == 1] != list(range(5, 13))  # not just the first ones
        assert script.pick(labels, 8) == picked
        assert len(script.pick(labels, 100)) == len(labels)

    def test_popular_rows_get_as_many_as_their_class_has(self, script):
        names = [f"name {i}" for i in range(20)]
        labels = [0] * 12 + [1] * 8
        lines = ["# a comment", "name 3, another word", "", "name 5", "name 15", "nowhere"]
        pairs = Counter(script.repeat_popular(names, labels, lines))
        assert pairs == {(3, "name 3"): 4, (3, "another word"): 4, (5, "name 5"): 4, (15, "name 15"): 8}

    def test_popular_rows_keep_picture_and_class(self, script, source, tmp_path):
        (tmp_path / "popular.txt").write_text("down, below\n")
        assert script.convert(source, tmp_path / "target.parquet", 64, popular=tmp_path / "popular.txt") == 2
        target = load_dataset("parquet", data_files=str(tmp_path / "target.parquet"), cache_dir=str(tmp_path))["train"]
        everything = load_dataset("parquet", data_files=str(source), cache_dir=str(tmp_path))["train"]
        assert list(target["text"]) == ["down", "below"]
        for row in target:
            assert row["label"] == everything[1]["label"]
            np.testing.assert_array_equal(np.asarray(row["image"]), np.asarray(everything[1]["image"]))

    def test_the_embedded_list_names_pictures_of_the_set(self, emoji):
        lines = (DATA / "popular.txt").read_text().splitlines()
        names = [line.split(",")[0].strip() for line in lines if line and line[0] != "#"]
        assert len(names) == len(set(names)) > 60
        assert set(names) <= set(emoji["train"]["text"])

    def test_same_bytes_each_time(self, script, source, tmp_path):
        for name in ("first.parquet", "second.parquet"):
            script.convert(source, tmp_path / name)
        assert (tmp_path / "first.parquet").read_bytes() == (tmp_path / "second.parquet").read_bytes()

    def test_refuses_other_images(self, script, pixels):
        with pytest.raises(ValueError, match="expected 64x64 RGB images, got 32x64 RGB"):
            script.encode(png(pixels[:, ::2]), 32)
        rgba = np.dstack([pixels, np.full((64, 64, 1), 255, np.uint8)])
        with pytest.raises(ValueError, match="got 64x64 RGBA"):
            script.encode(png(rgba), 64)


# Keywords

# As in emojibase: variation selectors, a name without keywords, repeated ones, typographic characters, skin tones.
ENTRIES = [
    {"label": "fire", "hexcode": "1F525", "tags": ["flame", "hot", "Fire"]},
    {"label": "snowflake", "hexcode": "2744", "tags": ["cold", "fire"]},
    {"label": "JAPANESE “here” button", "hexcode": "1F201"},
    {"label": "waving hand", "hexcode": "1f44b", "tags": ["wave"], "skins": [{"hexcode": "1F44B-1F3FB"}]},
    {"label": "man’s ice", "hexcode": "26F8-FE0F", "tags": ["5–0"]},
    {"label": "regional indicator A", "hexcode": "1F1E6"},
]


def write_set(path: Path, rows: list[tuple[str, str]], with_code_points: bool = True) -> Path:
    texts, code_points = zip(*rows, strict=True)
    columns = {"text": texts, "label": range(len(rows))} | ({"unified": code_points} if with_code_points else {})
    pq.write_table(pa.table({name: pa.array(list(column)) for name, column in columns.items()}), path)
    return path


def captions_of(path: Path) -> list[list[str]]:
    return pq.read_table(path)["captions"].to_pylist()


class TestKeywords:
    def test_files(self):
        folder = DATA / "emoji-keywords"
        assert sum(path.stat().st_size for path in folder.iterdir()) < 4e5
        assert "UNICODE LICENSE V3" in (folder / "LICENSE-UNICODE").read_text()
        assert (folder / "LICENSE-EMOJIBASE").read_text().startswith("MIT License")
        readme = (folder / "README.md").read_text()
        keywords = json.loads((folder / "keywords.json").read_text())
        assert f"for {len(keywords)} emoji" in readme
        assert {"flame", "hot"} <= set(keywords["1F525"])
        assert all(words and len(set(words)) == len(words) for words in keywords.values())
        assert not any("FE0F" in points.split("-") for points in keywords)

    def test_every_embedded_emoji_has_an_entry(self, keywords_script):
        keywords, names = keywords_script.read_table("keywords"), keywords_script.read_table("names")
        for name in ("noto-emoji-32/train", "noto-emoji-32/test"):
            texts = pq.read_table(DATA / f"{name}.parquet", columns=["text"])["text"].to_pylist()
            assert [text for text in texts if names[keywords_script.split_name(text)[0]] not in keywords] == []

    def test_keywords_of_held_out_emoji_stay_out(self, keywords_script, tmp_path):
        """The sets themselves: no emoji of the test set, its names or a keyword that only it has is in the training."""
        files = {split: DATA / "noto-emoji-64" / f"{split}.parquet" for split in ("train", "test")}
        keywords_script.join(files["train"], tmp_path / "train.parquet", files["test"])
        texts = pq.read_table(files["train"], columns=["text"])["text"].to_pylist()
        keywords, names = keywords_script.read_table("keywords"), keywords_script.read_table("names")
        split = keywords_script.split_name
        points = {
            name: {names[split(text)[0]] for text in pq.read_table(path, columns=["text"])["text"].to_pylist()}
            for name, path in files.items()
        }
        assert not points["train"] & points["test"]
        own = {word for point in points["train"] for word in keywords[point]}
        held_out = {word for point in points["test"] for word in keywords[point]}
        # What training must not say: the words of held-out emoji alone, and their names.
        forbidden = held_out - own - {split(text)[0] for text in texts}
        forbidden |= {keywords[point][0] for point in points["test"]}
        assert {"fruit"} <= held_out & own
        assert {"5-0", "mango", "guide dog"} <= forbidden
        captions = captions_of(tmp_path / "train.parquet")
        assert len(captions) == len(texts)
        for text, found in zip(texts, captions, strict=True):
            base, tones = split(text)
            assert found[0] == text
            assert {split(caption)[1] for caption in found} == {tones}
            words = {split(caption)[0] for caption in found}
            assert words <= {base, *keywords[names[base]]}
            assert not words & forbidden, text

    def test_make(self, keywords_script, tmp_path, monkeypatch):
        (tmp_path / "data.json").write_text(json.dumps(ENTRIES))
        with tarfile.open(tmp_path / "npm.tgz", "w:gz") as archive:
            archive.add(tmp_path / "data.json", "package/en/data.json")
        rows = [
            ("fire", "1F525"),
            ("waving hand, dark skin tone", "1F44B"),
            ("ice", "26F8-FE0F"),
            ("ice", "26F8-200D-2640"),
        ]
        names = write_set(tmp_path / "set.parquet", rows)
        keywords_script.main(["make", str(tmp_path / "npm.tgz"), str(tmp_path / "made"), "--names", str(names)])
        monkeypatch.setattr(keywords_script, "FOLDER", tmp_path / "made")
        assert keywords_script.read_table("keywords") == {
            "1F201": ["japanese here button"],
            "1F44B": ["waving hand", "wave"],
            "1F525": ["fire", "flame", "hot"],
            "26F8": ["man’s ice", "5-0"],
            "2744": ["snowflake", "cold", "fire"],
        }
        assert keywords_script.read_table("names") == {"fire": "1F525", "ice": "26F8-200D-2640", "waving hand": "1F44B"}

    @pytest.mark.parametrize("only", [True, False])
    def test_words_for_familiar_emoji(self, keywords_script, tmp_path, only):
        source = write_set(tmp_path / "set.parquet", [("fire", "1F525"), ("ice", "26F8"), ("automobile", "1F697")])
        (tmp_path / "list.txt").write_text("# a comment\n\nautomobile, car, motor\nfire\n")
        command = ["join", str(source), str(tmp_path / "joined.parquet"), "--familiar", str(tmp_path / "list.txt")]
        keywords_script.main(command + ["--only_familiar"] * only)
        keywords_script.main(["join", str(source), str(tmp_path / "plain.parquet")])
        fire, ice, car = captions_of(tmp_path / "plain.parquet")
        assert captions_of(tmp_path / "joined.parquet") == [fire, *[ice] * (not only), car + ["car", "motor"] * 3]

    @pytest.mark.parametrize("with_code_points", [True, False])
    def test_join(self, keywords_script, tmp_path, with_code_points, capsys):
        rows = [("fire", "1F525"), ("waving hand sign, dark skin tone", "1F44B"), ("unheard of", "0-FE0F")]
        source = write_set(tmp_path / "set.parquet", rows, with_code_points)
        keywords_script.main(["join", str(source), str(tmp_path / "joined.parquet"), "--name_repeats", "2"])
        assert "1 emoji have no keywords: unheard of" in capsys.readouterr().out
        fire, hand, unknown = captions_of(tmp_path / "joined.parquet")
        assert fire[:2] == ["fire", "fire"]
        assert {"flame", "hot"} <= set(fire[2:])
        assert "fire" not in fire[2:]
        assert hand[:3] == [*["waving hand sign, dark skin tone"] * 2, "waving hand, dark skin tone"]
        assert "wave, dark skin tone" in hand
        assert unknown == ["unheard of"] * 2
        assert pq.read_table(tmp_path / "joined.parquet").drop_columns("captions").equals(pq.read_table(source))

    def test_labels_keep_their_names(self, keywords_script, tmp_path):
        keywords_script.join(DATA / "noto-emoji-32" / "test.parquet", tmp_path / "joined.parquet")
        features = Features.from_arrow_schema(pq.read_schema(tmp_path / "joined.parquet"))
        assert features["label"] == ClassLabel(names=CATEGORIES)
        assert features["captions"] == List(Value("string"))

    def test_held_out_names_are_no_captions(self, keywords_script, tmp_path):
        """Fire is a keyword of the firecracker, and the name of another emoji."""
        source = write_set(tmp_path / "set.parquet", [("firecracker", "1F9E8")])
        keywords_script.join(source, tmp_path / "all.parquet")
        keywords_script.join(
            source, tmp_path / "joined.parquet", write_set(tmp_path / "test.parquet", [("fire", "1F525")])
        )
        (before,), (after,) = captions_of(tmp_path / "all.parquet"), captions_of(tmp_path / "joined.parquet")
        assert before == [*after[: before.index("fire")], "fire", *after[before.index("fire") :]]

    def test_refuses_held_out_emoji(self, keywords_script, tmp_path):
        """In another skin tone, too, and with another spelling of the code points."""
        source = write_set(tmp_path / "set.parquet", [("fire", "1F525"), ("writing hand, dark skin tone", "270D-fe0f")])
        held_out = write_set(tmp_path / "test.parquet", [("writing hand", "270D")])
        with pytest.raises(ValueError, match="1 emoji of .* such as 'writing hand, dark skin tone'"):
            keywords_script.join(source, tmp_path / "joined.parquet", held_out)
        assert not (tmp_path / "joined.parquet").exists()
