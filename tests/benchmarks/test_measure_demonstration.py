"""The prompts of the demonstration models, the measures of their samples by hand, and the benchmark at toy size."""

import importlib.util
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from toy_clips import save_clip
from toy_models import toy_tokenizer


REPOSITORY = Path(__file__).resolve().parents[2]
BENCHMARKS = REPOSITORY / "benchmarks"
CONCEPTS = ["fire", "heart", "face", "flag", "cat", "dog", "car", "apple", "star", "house"]
NAMES = [f"emoji {i}" for i in range(14)]


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))  # scripts import `measuring` beside them
        spec = importlib.util.spec_from_file_location("measure_demonstration", BENCHMARKS / "measure_demonstration.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def names():
    """Names of all emoji without skin tones, by split."""
    files = {split: REPOSITORY / f"data/noto-emoji-64/{split}.parquet" for split in ("train", "test")}
    texts = {split: pq.read_table(path, columns=["text"])["text"].to_pylist() for split, path in files.items()}
    return {split: {name for name in each if not name.endswith("skin tone")} for split, each in texts.items()}


class TestPrompts:
    @pytest.fixture
    def pairs(self):
        """Pairs of prompt and names: a repeated prompt would be lost in a dict."""
        return json.loads((REPOSITORY / "data/prompts.json").read_text(encoding="utf-8"), object_pairs_hook=list)

    def test_are_200_distinct_ones(self, pairs):
        assert len(pairs) == len({prompt for prompt, _ in pairs}) == 200
        assert [prompt for prompt, _ in pairs[:10]] == CONCEPTS

    def test_accept_emoji_of_the_sets(self, pairs, names):
        """And at least one that the models were trained with."""
        for prompt, right in pairs:
            assert right == sorted(set(right)), prompt
            assert set(right) <= names["train"] | names["test"], prompt
            assert set(right) & names["train"], prompt

    def test_parts_are_disjoint_and_complete(self, script, pairs):
        choosing, reporting = (script.part_of([p for p, _ in pairs], part) for part in ("choosing", "reporting"))
        assert (len(choosing), len(reporting)) == (95, 105)
        assert sorted(choosing + reporting) == list(range(200))
        assert set(range(10)) <= set(reporting)


class TestMeasures:
    def test_best_of_each(self, script):
        similarities = torch.tensor([[0.1, 0.5, 0.3], [0.9, -0.2, 0.0]])
        found = script.best_of_each(similarities, torch.tensor([2, 0, 2]), 4)
        torch.testing.assert_close(found, torch.tensor([[0.5, -1, 0.3, -1], [-0.2, -1, 0.9, -1]]))

    def test_ranks(self, script):
        """Only names that are higher than the best right one count."""
        scores = torch.tensor([[0.9, 0.8, 0.7, 0.6], [0.1, 0.4, 0.3, 0.2]])
        assert script.ranks(scores, [[3, 1], [0]]).tolist() == [1, 3]
        assert script.ranks(scores, [[0], [1, 0]]).tolist() == [0, 0]

    def test_share_is_a_mean_over_prompts(self, script):
        """Ten samples of one prompt weigh no more than two of another."""
        is_right, numbers = torch.tensor([True] * 10 + [False, True, False, False]), torch.tensor([0] * 10 + [7] * 4)
        shares, mean, error = script.share_right(is_right, numbers)
        assert shares == {0: 1.0, 7: 0.25}
        assert mean == 0.625
        assert error == pytest.approx(0.75 / 2)  # |a - b| / 2 of two values

    def test_nearest(self, script):
        """Root mean square of the differences: 3 everywhere; 12 in a quarter is 6."""
        images = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
        images[1, :, :2, :2] += 12
        others = torch.stack([images[0] + 3, images[0] + 100, images[0]])[:2]
        distances, numbers = script.nearest(images, others)
        assert distances[0].item() == pytest.approx(3)
        # From 103: 9 in a quarter, -3 in the others.
        assert distances[1].item() == pytest.approx((81 / 4 + 9 * 3 / 4) ** 0.5)
        assert numbers.tolist() == [0, 0]

    def test_references_are_right_for_the_prompts(self, script):
        names, right = ["dog", "cat", "sun", "moon"], [["cat", "dog"], ["star"], ["moon", "star"]]
        found = script.matched_references([0, 0, 1, 2, 2], right, names)
        assert [names[i] for i in found[2:]] == ["moon", "moon"]
        assert sorted(names[i] for i in found[:2]) == ["cat", "dog"]


def squares(number, seed):
    values = np.random.default_rng(seed).integers(0, 256, (number, 2, 2, 3), dtype=np.uint8)
    return [Image.fromarray(each).resize((64, 64), Image.Resampling.NEAREST) for each in values]


def write_set(path, names, seed, captions=True):
    rows = {"image": squares(len(names), seed), "text": names, "label": [0] * len(names)}
    if captions:
        rows["captions"] = [[name, f"word{name.removeprefix(name.split(',')[0])}"] for name in names]
    data = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    data.to_parquet(path)


@pytest.fixture(scope="module")
def folder(script, tmp_path_factory):
    """Sets, the judge's data and a judge of random weights."""
    folder = tmp_path_factory.mktemp("demonstration")
    toned = ["emoji 3, medium skin tone", "emoji 3, dark skin tone"]
    for name, seed in (("noto", 1), ("twemoji", 2)):
        write_set(folder / f"{name}.parquet", NAMES + toned, seed)
    files = ["--noto", str(folder / "noto.parquet"), "--twemoji", str(folder / "twemoji.parquet")]
    script.main(["data", *files, "--output_dir", str(folder / "data")])
    save_clip(folder / "judge", image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return folder


class TestScript:
    def test_data(self, folder):
        """One medium tone per style with the captions of the plain emoji; every twelfth name lacks Twemoji's image."""
        train, unseen = (pq.read_table(folder / f"data/{name}.parquet") for name in ("train", "unseen_images"))
        assert sorted(unseen["text"].to_pylist()) == sorted(NAMES)[::12] == ["emoji 0", "emoji 8"]
        texts = train["text"].to_pylist()
        assert len(texts) == 15 + 13
        assert [texts.count(f"emoji {i}") for i in (3, 8, 9)] == [4, 1, 2]
        assert ["emoji 3", "word"] in train["captions"].to_pylist()
        assert not any("tone" in text for texts in train["captions"].to_pylist() for text in texts)

    def test_judge_finds_its_references(self, script):
        """And, of two images of a name, the nearer one counts."""
        images = squares(6, seed=5)
        judge = script.FeatureJudge(images, [4, 2, 9, 4, 2, 9], 10)
        scores = judge(images)
        assert scores.argmax(dim=1).tolist() == [4, 2, 9, 4, 2, 9]
        assert scores.amax(dim=1).tolist() == pytest.approx([1.0] * 6, abs=1e-5)
        assert scores[:, [0, 1, 3]].eq(-1).all()  # names without images

    def test_whitening(self, script):
        """Within groups the covariance becomes the identity, up to the shrinkage."""
        generator = torch.Generator().manual_seed(0)
        numbers = torch.arange(200).repeat(2)
        spread = torch.tensor([3.0, 0.5, 1.0])
        features = 10 * torch.randn(200, 3, generator=generator).repeat(2, 1)
        features += spread * torch.randn(400, 3, generator=generator)
        white = features @ script.whiten_within(features, numbers)
        halves = white[:200] - white[200:]
        covariance = halves.T @ halves / (4 * 200)  # of deviations from the mean of each pair
        expected = spread**2 / (spread**2 + script.SHRINKAGE * (spread**2).mean())
        assert covariance.diagonal().sort().values.tolist() == pytest.approx(expected.sort().values.tolist(), abs=0.1)
        assert (covariance - covariance.diagonal().diag()).abs().max() < 1e-4

    def test_clip_ranks_as_transformers(self, script, folder):
        """The similarities of `CLIPModel` itself, whose logits they are up to the temperature."""
        judge, images = script.CLIPJudge(str(folder / "judge"), NAMES), squares(2, seed=6)
        small = [image.resize((8, 8), Image.Resampling.BICUBIC) for image in images]
        pixel_values = torch.stack([torch.tensor(np.array(image)) for image in small]).permute(0, 3, 1, 2) / 127.5 - 1
        encoded = toy_tokenizer()(NAMES, padding=True, return_tensors="pt")
        with torch.no_grad():
            output = judge.clip(input_ids=encoded.input_ids, pixel_values=pixel_values)
        scores = output.logits_per_image / judge.clip.logit_scale.exp()
        torch.testing.assert_close(judge(images), scores, atol=1e-5, rtol=1e-4)

    def test_measures_samples(self, script, folder, tmp_path, monkeypatch):
        """Samples that are training images are copies, and right by the nearest image."""
        monkeypatch.setattr(script, "EMOJI", str(tmp_path))
        write_set(tmp_path / "train.parquet", NAMES, seed=1, captions=False)
        write_set(tmp_path / "test.parquet", ["emoji unseen"], seed=3, captions=False)
        prompts = {f"prompt {i}": [f"emoji {i}"] for i in range(14)}
        (tmp_path / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
        noto = squares(16, seed=1)
        images = [noto[i] for i in range(10) for _ in range(10)] + squares(4, seed=9)
        numbers = [i for i in range(10) for _ in range(10)] + [11] * 4
        pixels = np.stack([np.array(image) for image in images]).transpose(0, 3, 1, 2)
        settings = json.dumps({"guidance_scale": 2.0, "seconds_per_image": 0.5})
        np.savez(tmp_path / "samples.npz", images=pixels, numbers=np.array(numbers), settings=settings)
        options = {"clip": folder / "judge", "data_dir": folder / "data", "samples": tmp_path / "samples.npz"}
        options |= {"prompts": tmp_path / "prompts.json", "output_dir": tmp_path / "results"}
        script.main(["measure", *(str(x) for key, value in options.items() for x in (f"--{key}", value))])
        report = json.loads((tmp_path / "results/demonstration.json").read_text(encoding="utf-8"))
        (row,) = report["rows"].values()
        assert set(row["features"]["concepts"].values()) == {"10/10"}
        assert row["distance_copies"] == pytest.approx(100 / 104)
        assert row["distance"]["median"] == pytest.approx(0, abs=1e-4)
        for name, size in (("prompts", (10, 10)), ("nearest", (10, 4))):
            with Image.open(tmp_path / f"results/demonstration_{name}.png") as figure:
                assert figure.width > script.FIGURE_SIZE * size[0]
                assert figure.height > script.FIGURE_SIZE * size[1]
