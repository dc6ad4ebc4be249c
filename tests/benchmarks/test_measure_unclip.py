"""The measures of unCLIP against brute force, and the whole benchmark at toy size."""

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
from toy_models import TEXT_CONFIGS, fill_randomly, random_text_encoder, random_unet, toy_tokenizer
from unclip_models import EMBEDDING_WIDTH, SIZE, random_clip_vision, toy_image_processor

from diffusers_adm import ADMUnCLIPPipeline, LearnedVarianceDDPMScheduler, UnCLIPProjectionModel


BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def measure_unclip():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))  # scripts import `measuring` beside them
        spec = importlib.util.spec_from_file_location("measure_unclip", BENCHMARKS / "measure_unclip.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


def cosine(first, second):
    return float(np.dot(first, second) / np.linalg.norm(first) / np.linalg.norm(second))


def test_agreement_by_brute_force(measure_unclip):
    generator = np.random.default_rng(0)
    given = generator.normal(size=(8, 5))
    found = given + generator.normal(size=(8, 5))
    row = measure_unclip.agreement(torch.from_numpy(found), torch.from_numpy(given))
    own = [cosine(found[i], given[i]) for i in range(8)]
    shuffled = [cosine(found[i], given[(i + 1) % 8]) for i in range(8)]
    nearest = [max(range(8), key=lambda j: cosine(found[i], given[j])) == i for i in range(8)]
    assert row["own"] == pytest.approx(np.mean(own))
    assert row["shuffled"] == pytest.approx(np.mean(shuffled))
    differences = np.array(own) - shuffled
    assert row["difference_error"] == pytest.approx(differences.std(ddof=1) / 8**0.5)
    assert row["nearest"] == pytest.approx(np.mean(nearest))
    assert 0 < row["nearest"] < row["among_5"] <= 1


def test_paths(measure_unclip):
    straight = torch.tensor([[1.0, 0.0], [0.7, 0.2], [0.1, 0.9]])
    assert measure_unclip.is_monotone(straight) == {"steps_right": 1.0, "monotone": 1.0, "difference_monotone": 1.0}
    bent = torch.tensor([[1.0, 0.0], [0.7, 0.4], [0.1, 0.3]])  # away from the second end in the last step
    assert measure_unclip.is_monotone(bent) == {"steps_right": 0.75, "monotone": 0.0, "difference_monotone": 1.0}
    assert measure_unclip.is_monotone(straight.flip(0))["steps_right"] == 0.0


def test_the_benchmark(measure_unclip, tmp_path, monkeypatch, capsys):
    generator = np.random.default_rng(0)
    rows = {"image": [], "text": []}
    for index in range(6):
        pixels = generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        path = tmp_path / f"{index}.png"
        Image.fromarray(pixels).save(path)
        rows["image"].append({"bytes": path.read_bytes(), "path": None})
        rows["text"].append(("a cat", "a red dog")[index % 2])
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "images.parquet")
    components = {
        "unet": random_unet(**TEXT_CONFIGS["added_kv"], class_embed_type="identity"),
        "scheduler": LearnedVarianceDDPMScheduler(),
        "image_projection": fill_randomly(UnCLIPProjectionModel(2, EMBEDDING_WIDTH, 32, 16, "states")),
        "text_encoder": random_text_encoder("clip"),
        "tokenizer": toy_tokenizer("clip"),
        "image_encoder": random_clip_vision(),
        "feature_extractor": toy_image_processor(),
    }
    pipe = ADMUnCLIPPipeline(**dict.fromkeys(ADMUnCLIPPipeline._optional_components) | components)
    pipe.save_pretrained(tmp_path / "pipe")
    words = ["measure_unclip.py", "--model", tmp_path / "pipe", "--data_files", tmp_path / "images.parquet"]
    words += ["--output_dir", tmp_path / "out", "--num_pairs", 2, "--num_points", 3, "--num_inference_steps", 1]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    measure_unclip.main()
    output = capsys.readouterr().out
    assert "6 images; by chance the own embedding is the nearest one in 0.167" in output
    result = json.loads((tmp_path / "out" / "unclip.json").read_text())
    assert set(result["rows"]) == {"image", "variation", "and caption", "caption only"}
    assert result["rows"]["image"]["own"] == pytest.approx(1)  # the embedding is that of the image
    assert result["rows"]["image"]["nearest"] == 1
    assert len(result["pairs"]) == 2
    assert (tmp_path / "out" / "interpolation.png").is_file()
