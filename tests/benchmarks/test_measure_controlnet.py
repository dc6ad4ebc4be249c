"""The measure of edge agreement against brute force, and the whole benchmark at toy size."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from toy_models import CONDITIONAL, fill_randomly, random_unet

from diffusers_adm import AdaGNControlNetModel, ADMPipeline, LearnedVarianceDDPMScheduler


BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def measure_controlnet():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))  # scripts import `measuring` beside them
        spec = importlib.util.spec_from_file_location("measure_controlnet", BENCHMARKS / "measure_controlnet.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


def agreement(sample, condition, tolerance=1):
    """Precision, recall and F1 by looking at every pair of edge pixels."""
    ours, theirs = np.argwhere(sample), np.argwhere(condition)

    def share(points, others):
        near = [any(max(abs(p - q)) <= tolerance for q in others) for p in points]
        return sum(near) / len(near) if near else 0.0

    precision, recall = share(ours, theirs), share(theirs, ours)
    if len(ours) == len(theirs) == 0:
        return precision, recall, 1.0
    return precision, recall, 2 * precision * recall / (precision + recall) if precision + recall else 0.0


class TestEdgeAgreement:
    def test_all_pairs_by_brute_force(self, measure_controlnet):
        generator = np.random.default_rng(0)
        density = np.array([0.0, 0.02, 0.05, 0.1, 0.5, 1.0])[:, None, None]
        samples, conditions = (generator.random((6, 9, 12)) < density for _ in range(2))
        assert not samples[0].any()
        result = measure_controlnet.measure(torch.from_numpy(samples), torch.from_numpy(conditions[:5]))
        for i in range(6):
            for j in range(5):
                values = [result[name][i, j].item() for name in ("precision", "recall", "f1")]
                assert values == pytest.approx(agreement(samples[i], conditions[j]), abs=1e-12)
                exact = agreement(samples[i], conditions[j], tolerance=0)[2]
                assert result["f1_exact"][i, j].item() == pytest.approx(exact, abs=1e-12)

    def test_one_pixel_is_tolerated_and_two_are_not(self, measure_controlnet):
        line = torch.zeros(1, 10, 10, dtype=torch.bool)
        line[0, :, 4] = True
        for shift, f1 in ((0, 1.0), (1, 1.0), (-1, 1.0), (2, 0.0)):
            assert measure_controlnet.edge_agreement(line.roll(shift, 2), line)["f1"].item() == pytest.approx(f1)
        half = line.clone()
        half[0, 5:] = False  # 5 of 10 pixels, which reach one further
        result = measure_controlnet.edge_agreement(half, line)
        assert result["precision"].item() == 1
        assert result["recall"].item() == pytest.approx(0.6)
        assert result["f1"].item() == pytest.approx(2 * 0.6 / 1.6)

    def test_images_without_edges(self, measure_controlnet):
        none, some = torch.zeros(1, 6, 6, dtype=torch.bool), torch.eye(6, dtype=torch.bool)[None]
        for samples, conditions, f1 in ((none, none, 1.0), (none, some, 0.0), (some, none, 0.0), (some, some, 1.0)):
            assert measure_controlnet.edge_agreement(samples, conditions)["f1"].item() == pytest.approx(f1)


def picture(number):
    image = Image.new("RGB", (16, 16), (255, 255, 255))
    image.paste((200, 30, 10), (2 + number, 3, 9 + number, 12))
    return image


@pytest.fixture
def arguments(tmp_path):
    """A base by class, which has other numbers for the classes than the data, a new branch of it, and four pictures."""
    unet, names = random_unet(sample_size=16, **CONDITIONAL), dict(enumerate("bdac"))
    base = ADMPipeline(unet, LearnedVarianceDDPMScheduler(), None, None, None, None, id2label=names)
    base.save_pretrained(tmp_path / "base")
    AdaGNControlNetModel.from_unet(unet).save_pretrained(tmp_path / "branch")
    images = []
    for i in range(4):
        picture(i).save(tmp_path / "image.png")
        images.append({"bytes": (tmp_path / "image.png").read_bytes(), "path": None})
    columns = {"image": images, "label": list("abab"), "text": ["left", "left", "right", "far right"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "test.parquet")
    return {
        "pipeline": tmp_path / "base",
        "controlnet": tmp_path / "branch",
        "data_files": tmp_path / "test.parquet",
        "output_dir": tmp_path / "out",
        "label_column": "label",
        "caption_column": "text",
        "num_inference_steps": 3,
        "batch_size": 3,
    }


def run(module, monkeypatch, arguments):
    command = [str(part) for name, value in arguments.items() for part in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["measure_controlnet.py", *command])
    module.main()
    return json.loads((arguments["output_dir"] / "controlnet.json").read_text())["cells"]


class TestBenchmark:
    def test_a_new_branch_changes_nothing_at_any_scale(self, measure_controlnet, arguments, monkeypatch, capsys):
        cells = run(measure_controlnet, monkeypatch, arguments)
        assert list(cells) == ["0", "0.5", "1", "chance"]
        pipeline = ADMPipeline.from_pretrained(arguments["pipeline"])
        generators = [torch.Generator().manual_seed(i) for i in range(4)]
        drawn = pipeline(class_labels=[2, 0, 2, 0], num_inference_steps=3, generator=generators).images
        edges = [measure_controlnet.edges_of(images).numpy() for images in (drawn, [picture(i) for i in range(4)])]
        expected = [agreement(*pair)[2] for pair in zip(*edges, strict=True)]
        assert max(expected) > 0
        for scale in ("0", "0.5", "1"):
            assert cells[scale]["f1_of_each"] == pytest.approx(expected, abs=1e-12)
            assert cells[scale]["f1"] == pytest.approx(np.mean(expected))
            assert cells[scale]["f1_error"] == pytest.approx(np.std(expected, ddof=1) / 2)
        assert (cells["1"]["minus_first"], cells["1"]["minus_previous_error"]) == pytest.approx((0.0, 0.0))

        # Pictures of the same caption are no other ones.
        f1 = np.array([[agreement(a, b)[2] for b in edges[1]] for a in edges[1]])
        others = [f1[[2, 3], 0].mean(), f1[[2, 3], 1].mean(), f1[[0, 1, 3], 2].mean(), f1[[0, 1, 2], 3].mean()]
        assert cells["chance"]["f1"] == pytest.approx(np.mean(others), abs=1e-12)
        assert cells["chance"]["f1"] < 1

        table = capsys.readouterr().out.split("\n\n")[-1].splitlines()
        assert [row.split("|")[1].strip() for row in table] == ["scale", "---", "0", "0.5", "1", "chance"]
        assert len({row.count("|") for row in table}) == 1
        assert (arguments["output_dir"] / "controlnet.png").is_file()

    def test_differences_are_paired(self, measure_controlnet, arguments, monkeypatch):
        branch = fill_randomly(AdaGNControlNetModel.from_pretrained(arguments["controlnet"]))
        branch.save_pretrained(arguments["controlnet"])
        cells = run(measure_controlnet, monkeypatch, arguments)
        scores = [np.array(cells[scale]["f1_of_each"]) for scale in ("0", "0.5", "1")]
        assert any(scores[0] != scores[2])
        for name, differences in (("minus_first", scores[2] - scores[0]), ("minus_previous", scores[2] - scores[1])):
            assert cells["1"][name] == pytest.approx(differences.mean())
            assert cells["1"][f"{name}_error"] == pytest.approx(differences.std(ddof=1) / 2)
        assert "minus_first" not in cells["0"]
