"""The command line as a process of its own, and how much memory a conversion takes."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from openai_networks import NETWORKS
from PIL import Image

from diffusers_adm import AdaGNClassifierModel, ADMPipeline
from diffusers_adm.commands.errors import run_command
from diffusers_adm.conversion import PRESETS, openai
from diffusers_adm.conversion.common import expected_shapes
from diffusers_adm.conversion.openai_checkpoints import build_network
from diffusers_adm.conversion.openai_layout import tensor_rules


NETWORK = NETWORKS["new-order"]


def main(capsys, *arguments):
    openai.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_there_as_a_process_of_its_own_and_back(tmp_path, capsys):
    command = [sys.executable, "-m", "diffusers_adm.conversion.openai", "--checkpoint", NETWORK.save(tmp_path)]
    command += ["--model_flags", NETWORK.flags, "--output_dir", tmp_path / "out"]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert f"Wrote {tmp_path / 'out'}: a U-Net of guided-diffusion, 756,163 parameters in float32." in result.stdout
    assert "ADMPipeline.from_pretrained" in result.stdout
    assert ADMPipeline.from_pretrained(tmp_path / "out").unet.config.num_attention_heads == 4

    output = main(capsys, "--export", tmp_path / "out", "--output_file", tmp_path / "back.pt")
    assert "--use_new_attention_order True" in output
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert all(torch.equal(back[name], tensor) for name, tensor in NETWORK.weights().items())

    arguments = ("--export", tmp_path / "out", "--output_file", tmp_path / "old.pt", "--new_attention_order", "false")
    assert "--use_new_attention_order" not in main(capsys, *arguments)
    name = "middle_block.1.qkv.weight"
    assert not torch.equal(torch.load(tmp_path / "old.pt")[name], back[name])


def test_what_was_assumed_is_said(tmp_path, capsys):
    output = main(capsys, "--checkpoint", NETWORK.save(tmp_path), "--output_dir", tmp_path / "out")
    warning = next(line for line in output.splitlines() if line.startswith("WARNING"))
    for told in ("--num_heads 4", "--use_new_attention_order False", "--diffusion_steps 1000"):
        assert told in warning
    assert "--num_channels" not in warning


def test_what_was_left_aside_is_said(tmp_path, capsys):
    flags = f"{NETWORK.flags} --batch_size 4 --classifier_width 64"
    arguments = ("--checkpoint", NETWORK.save(tmp_path), "--output_dir", tmp_path / "out", f"--model_flags={flags}")
    assert "left aside: --batch_size, --classifier_width." in main(capsys, *arguments)


@pytest.mark.parametrize(
    "name, flags, cls",
    [
        ("grey-five-classes", "--diffusion_steps 40", "ADMPipeline"),
        ("grey-upsampler", "--diffusion_steps 40", "ADMSuperResolutionPipeline"),
        ("adaptive-pool", "", "AdaGNClassifierModel"),
    ],
)
def test_how_to_load_it_is_said_and_works(name, flags, cls, tmp_path, capsys):
    network = NETWORKS[name]
    arguments = ("--checkpoint", network.save(tmp_path), "--output_dir", tmp_path / "out")
    output = main(capsys, *arguments, f"--model_flags={network.flags} {flags}")
    instructions = output[output.index("Load it with\n") + len("Load it with\n") :]
    assert cls in instructions
    loaded = {"small_image": Image.new("L", (16, 16))}
    exec("\n".join(line.strip() for line in instructions.splitlines()), loaded)
    if network.kind != "classifier":
        assert loaded["image"].size == {"unet": (16, 16), "upsampler": (64, 64)}[network.kind]
    else:
        assert type(loaded["classifier"]).__name__ == cls
        assert loaded["scheduler"].config.num_train_timesteps == 1000


def test_presets_are_listed(capsys):
    output = main(capsys, "--list_presets")
    assert output.count("openaipublic.blob.core.windows.net") == len(PRESETS)
    assert "lsun_cat (guided-diffusion, 552,814,086 parameters, https://" in output


def test_errors_have_no_traceback(tmp_path, capsys):
    file = NETWORK.save(tmp_path)
    for arguments, message in (
        (("--checkpoint", file, "--preset", "lsun_cat", "--output_dir", tmp_path / "out"), "error: The 756,163 param"),
        (("--checkpoint", tmp_path / "none.pt", "--output_dir", tmp_path / "out"), "error: `checkpoint`"),
        (("--checkpoint", file, "--output_dir", file / "out"), "error: "),
        (("--export", tmp_path, "--output_file", tmp_path / "back.pt"), "error: `model` is"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run_command(functools.partial(openai.main, list(map(str, arguments))))
        assert stopped.value.code == 2
        assert capsys.readouterr().err.startswith(message)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "pass `--checkpoint FILE.pt --output_dir FOLDER`"),
        (("--checkpoint", "a.pt"), "pass `--checkpoint FILE.pt --output_dir FOLDER`"),
        (("--export", "a"), "`--export FOLDER` needs `--output_file"),
        (("--check", "a.pt"), "unrecognized arguments: --check"),
        (("--checkpoint", "a.pt", "--output_dir", "b", "--code_base", "edm"), "invalid choice: 'edm'"),
        (("--export", "a", "--output_file", "b", "--new_attention_order", "maybe"), "--new_attention_order"),
    ],
)
def test_wrong_use(arguments, message, capsys):
    with pytest.raises(SystemExit):
        openai.main(list(arguments))
    assert message in capsys.readouterr().err


MEASURE = """
import json, sys
from diffusers_adm.conversion import common, convert_openai

def memory(kind):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(kind)]
    return 1024 * int(line.split()[1])

warm_up, warm_up_flags, *files = sys.argv[1:]
convert_openai(warm_up, warm_up + "-out", model_flags=warm_up_flags)  # for what is imported late
common.MAPPED_BYTES = 2**24  # a tenth of these files, as 2**27 is of the published ones
for file in files:
    before = memory("VmRSS")
    result = convert_openai(file, file + "-out")
    increase = memory("VmHWM") - before  # of this file or of one before it
    print(json.dumps({"increase": increase, "preset": result.preset, "recognised": result.recognised}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
def test_the_peak_of_memory_is_below_1_3_times_the_file(tmp_path):
    """On files of 170 MB, laid out like the published one that they are taken for."""
    name = "128x128_classifier"
    kind, flags = PRESETS[name].settle()
    model = build_network(flags, "guided-diffusion", kind, None)
    shapes = expected_shapes(model, tensor_rules(model, False))
    weights = {key: torch.full(shape, float(number)) for number, (key, shape) in enumerate(shapes.items())}
    files = [tmp_path / "zip.pt", tmp_path / "old.pt"]
    for file in files:
        torch.save(weights, file, _use_new_zipfile_serialization=file.stem == "zip")

    command = [sys.executable, "-c", MEASURE, NETWORK.save(tmp_path), NETWORK.flags, *files]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    for file, line in zip(files, result.stdout.splitlines()[-2:], strict=True):
        measured, size = json.loads(line), file.stat().st_size
        assert size > 1.6e8
        assert (measured["preset"], measured["recognised"]) == (name, True)
        # An archive is mapped into memory piece by piece; the old format is read at once.
        assert measured["increase"] < (0.6 if file.stem == "zip" else 1.3) * size, file
        converted = AdaGNClassifierModel.from_pretrained(f"{file}-out", subfolder="classifier")
        assert torch.equal(converted.conv_in.weight, weights["input_blocks.0.0.weight"])
        assert torch.equal(converted.head.to_out.bias, weights["out.2.c_proj.bias"])
