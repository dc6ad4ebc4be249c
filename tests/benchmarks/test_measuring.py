"""Shared code of the benchmarks, and the list of them."""

import importlib
import re
from pathlib import Path

import pytest
import torch


BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Imports a module of the folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def tiny(load, monkeypatch):
    networks = load("networks")
    config = {
        **networks.ADM,
        "layers_per_block": 1,
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    }
    monkeypatch.setattr(networks, "NETWORKS", {"tiny": config})
    monkeypatch.setattr(networks, "convolution_rate", lambda dtype, device: 1e9)
    return config


def test_every_script_is_listed():
    listed = set(re.findall(r"`(\w+\.(?:py|sh))`", (BENCHMARKS / "README.md").read_text(encoding="utf-8")))
    assert {path.name for path in BENCHMARKS.iterdir() if path.suffix in (".py", ".sh")} <= listed


def test_rows_in_markdown(load):
    rows = [{"name": "a", "ratio": 0.987}, {"name": "b"}, {"name": "c", "ratio": None}]
    table = load("measuring").markdown_table(rows, {"network": "{name}", "ratio": "{ratio:.2f}"})
    assert table.splitlines() == ["| network | ratio |", "| --- | --- |", "| a | 0.99 |", "| b |  |", "| c |  |"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model name\t: X\nflags\t\t: fpu avx2 avx512_bf16 amx_bf16\n\nflags\t\t: fpu", ["avx512_bf16", "amx_bf16"]),
        ("Features\t: fp asimd bf16", ["bf16"]),
        ("flags\t\t: fpu avx2\nbugs\t\t: bf16", []),
    ],
)
def test_cpu_features(load, tmp_path, text, expected):
    (tmp_path / "cpuinfo").write_text(text)
    assert load("measuring").cpu_features(tmp_path / "cpuinfo") == expected


def test_cpu_features_of_other_systems(load, tmp_path):
    assert load("measuring").cpu_features(tmp_path / "missing") == []


def test_machine_names_processor_and_instruction_set(load):
    described = load("measuring").describe_machine()
    assert torch.backends.cpu.get_cpu_capability() in described
    assert torch.__version__ in described


def test_round_robin_turns_around(load):
    order = []
    functions = {name: lambda name=name: order.append(name) for name in "abc"}
    times = load("measuring").round_robin(functions, 2, "cpu")
    assert order == ["c", "b", "a", "a", "b", "c"]
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2, "c": 2}


def test_unet_rows(load, tiny, monkeypatch, capsys):
    """Both modes, with their table."""
    bench = importlib.reload(load("bench_unet"))
    monkeypatch.setattr(bench, "TIME_LIMIT", 1e9)  # no timing is asserted
    arguments = ["bench_unet", "--pairs", "1", "--batch_size", "1", "--memory_runs", "0"]
    monkeypatch.setattr("sys.argv", [*arguments, "--only", "contiguous", "autocast"])
    assert bench.main() == 0
    printed = capsys.readouterr().out
    assert "| tiny | autocast | contiguous | forward |" in printed
    assert "| tiny | autocast | contiguous | forward+backward |" in printed


def test_casts_do_not_warn(load, tiny, monkeypatch):
    warned = []
    monkeypatch.setattr("diffusers.models.modeling_utils.logger.warning", warned.append)
    load("networks").build("theirs", "tiny", "bfloat16", "contiguous", "cpu")
    assert warned == []


def test_autocast_of_networks(load, tiny):
    """autocast: float32 weights and a bfloat16 result, near that of float32."""
    networks = load("networks")
    model = networks.build("ours", "tiny", "autocast", "channels_last", "cpu")
    inputs = networks.make_inputs("tiny", "autocast", "channels_last", 2, "cpu")
    assert model.dtype == inputs[0].dtype == torch.float32
    with torch.no_grad():
        expected = model(*inputs).sample
        with networks.autocast("autocast", "cpu"):
            result = model(*inputs).sample
    assert result.dtype == torch.bfloat16
    # Each operation rounds to 2**-9; some ten of them follow each other.
    assert (result - expected).norm() / expected.norm() < 0.05


def test_compiled_rows(load, tiny, monkeypatch, capsys):
    """Eager variants without a compiler: agreement, the faster format, and reasons of what is skipped."""
    bench = importlib.reload(load("bench_compiled"))
    monkeypatch.setattr(bench, "BASELINE", "ours, eager")
    monkeypatch.setattr(bench, "RATE_LIMITS", {"float32": 0})
    monkeypatch.setattr(bench, "TIME_LIMITS", {})
    variants = ["ours, eager", "diffusers, eager", "guided-diffusion"]
    monkeypatch.setattr(
        "sys.argv", ["x", "--only", "float32", "--rounds", "2", "--batch_size", "1", "--variants", *variants]
    )
    assert bench.main() == 0
    printed = capsys.readouterr().out
    assert "guided-diffusion: skipped, needs a checkout" in printed
    assert "| tiny | float32 | ours, eager |" in printed
    assert "| tiny | float32 | diffusers, eager |" in printed


def test_another_function_fails(load):
    """A variant that computes something else fails however fast it is, and the fastest format counts."""
    bench = load("bench_compiled")
    row = {"of_conv_rate": 0.9, "error": 1e-6, "first_call_s": 1.0}
    rows = {
        (bench.BASELINE, "channels_last"): {**row, "ms": 10.0, "times_s": [0.01, 0.01]},
        ("diffusers, eager", "contiguous"): {**row, "ms": 20.0, "times_s": [0.02, 0.02]},
        ("diffusers, eager", "channels_last"): {**row, "ms": 15.0, "times_s": [0.015, 0.015]},
        ("ours, eager", "contiguous"): {**row, "ms": 5.0, "times_s": [0.005, 0.005], "error": 0.1},
    }
    found = {row["variant"]: row for row in bench.compare(bench.Case("64x64", "float32", None), rows)}
    assert found["diffusers, eager"]["format"] == "channels_last"
    assert found["diffusers, eager"]["ratio"] == pytest.approx(1.5)
    assert {name for name, row in found.items() if not row["passed"]} == {"ours, eager"}


def test_arguments_of_guided_diffusion(load):
    """Attention at the downsampling factors of the blocks that have it."""
    networks = load("networks")
    arguments = networks.guided_diffusion_arguments(networks.NETWORKS["64x64"])
    assert arguments["channel_mult"] == (1, 2, 3, 4)
    assert arguments["attention_resolutions"] == [4, 8]
