"""
The guide docs/your_own_images.md: its commands and its code run, section by section, in this process and with few small
steps; what they write has the type, size and range that the guide promises. `CHANGES` lists what is shortened.
"""

import importlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import tifffile
import yaml
from markdown_pages import REPOSITORY, Block, blocks
from PIL import Image
from runs import own_process_state, reset_accelerate
from scripts import load_script

from diffusers_adm.conditioning.image_format import ImageFormat
from diffusers_adm_cli.main import find_command


GUIDE = REPOSITORY / "docs" / "your_own_images.md"
NUM_IMAGES = 6  # of each folder
CHANGES = {
    r"--num_images \d+": f"--num_images {NUM_IMAGES}",
    r" --max_train_steps \d+": "",
    r" --train_batch_size \d+": "",
    r" --num_validation_images \d+": "",
    r"--timestep_respacing \d+": "--timestep_respacing 2",
    r"--num_inference_steps \d+": "--num_inference_steps 2",
    r"(small\.yaml)": r"\1 --max_train_steps 2 --train_batch_size 2 --num_validation_images 2 "
    "--validation_num_inference_steps 2 --report_to none --lr_warmup_steps 0",
    r"\bpipe\(\)": "pipe(num_inference_steps=2)",
    r"\bpipe\(output": "pipe(num_inference_steps=2, output",
}
DRAWING = "draw_own_images.py"  # a loop over all kinds; each test draws its own

make_images = load_script("example_images")


@pytest.fixture(autouse=True)
def clone(tmp_path, monkeypatch) -> Path:
    """The working directory looks like that of a clone, without other files."""
    for name in ("training", "benchmarks"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    with own_process_state("train_adm"):
        yield tmp_path


def section(name: str) -> list[Block]:
    """The blocks under a heading of the guide."""
    text = GUIDE.read_text(encoding="utf-8")
    lines = {text[: match.start()].count("\n") + 1: match[1] for match in re.finditer(r"^## (.*)$", text, re.M)}
    heading_of = {block.line: lines[max(line for line in lines if line < block.line)] for block in blocks(GUIDE)}
    return [block for block in blocks(GUIDE) if heading_of[block.line] == name]


def change(code: str) -> str:
    for pattern, replacement in CHANGES.items():
        code = re.sub(pattern, replacement, code)
    return code


def commands(block: Block) -> list[list[str]]:
    """The words of each command of a shell block."""
    code = change(block.code.replace("\\\n", " "))
    return [words for line in code.splitlines() if (words := shlex.split(line, comments=True))]


def run_command(words: list[str]) -> None:
    """Runs `python FILE`, `python -m MODULE`, `accelerate launch FILE` or `diffusers-adm` in this process."""
    reset_accelerate()
    if words[0] == "diffusers-adm":
        command, arguments = find_command(words[1:])
        if command.start == "launched":
            load_script(command.module.rpartition(".")[2]).main(arguments)
        else:
            importlib.import_module(command.module).main([*command.first_arguments, *arguments])
        return
    words = words[2:] if words[:2] == ["accelerate", "launch"] else words[1:]
    if words[0] == "-m":
        importlib.import_module(f"{words[1]}.__main__").main(words[2:])
    else:
        load_script(Path(words[0]).stem).main(words[1:])


def run_section(name: str) -> dict[str, object]:
    """Runs the blocks of a section, and returns the variables of its code."""
    namespace: dict[str, object] = {"__name__": "guide"}
    for block in section(name):
        if block.language == "python":
            exec(compile(change(block.padded), GUIDE.name, "exec"), namespace)
        elif DRAWING not in block.code:
            for words in commands(block):
                run_command(words)
    return namespace


def saved_format(model: str) -> ImageFormat:
    """What the saved pipeline records."""
    config = json.loads((Path("runs") / model / "model_index.json").read_text())["image_format"]
    return ImageFormat(config["mode"], config["channels"], tuple(config["value_range"]), config["num_levels"])


def saved_unet(model: str) -> dict:
    return json.loads((Path("runs") / model / "unet" / "config.json").read_text())


def draw(kind: str) -> None:
    """The figure of the guide has the data and the samples."""
    import draw_own_images

    arguments = f"{kind} --data runs/data/{kind} --samples runs/{kind}-samples --output own_{kind}.png"
    draw_own_images.main(arguments.split())
    with Image.open(f"own_{kind}.png") as figure:
        assert figure.size[0] > 800
        assert len(figure.convert("RGB").getcolors()) > 50


def files(folder: str, ending: str) -> list[Path]:
    paths = sorted((Path("runs") / folder).glob(f"*.{ending}"))
    assert len(paths) == NUM_IMAGES
    return paths


def test_scans(caplog):
    with caplog.at_level("INFO"):
        variables = run_section("Grey scans of 12 bits")

    assert saved_format("scans") == ImageFormat("L", 1, (0, 4095), 4096)
    assert (saved_unet("scans")["in_channels"], saved_unet("scans")["out_channels"]) == (1, 2)
    assert "grey images from 0 to 4095 (4096 levels)" in caplog.text
    for path in files("scans-samples", "png"):
        with Image.open(path) as image:
            assert (image.mode, image.size) == ("I;16", (32, 32))
            values = np.array(image)
        assert 255 < values.max() <= 4095  # in 12 of 16 bits
    assert variables["scan"].dtype == np.uint16
    assert variables["scan"].shape == (32, 32)
    assert variables["scan"].max() <= 4095
    assert variables["fractions"].shape == (1, 32, 32, 1)
    assert 0 <= variables["fractions"].min() <= variables["fractions"].max() <= 1
    bits = json.loads(Path("runs/scans-bits/bits_per_dim.json").read_text())
    assert bits["num_images"] == NUM_IMAGES
    assert bits["bits_per_dim"] > 8  # of an untrained model: 12 for uniform values
    draw("scans")


def test_bands():
    variables = run_section("Satellite images of five bands")

    data = np.stack([tifffile.imread(path) for path in files("data/bands", "tif")])
    assert data.shape == (NUM_IMAGES, 32, 32, 5)
    low, high = int(data.min()), int(data.max())
    assert saved_format("bands") == ImageFormat("array", 5, (low, high), high - low + 1)
    assert (saved_unet("bands")["in_channels"], saved_unet("bands")["out_channels"]) == (5, 10)
    for path in files("bands-samples", "tiff"):
        values = tifffile.imread(path)
        assert (values.dtype, values.shape) == (np.uint16, (32, 32, 5))
        assert low <= values.min() < values.max() <= high
    assert variables["reflectance"].shape == (32, 32, 5)
    assert variables["reflectance"].max() > 0.02  # neither fractions of the range nor of 65535
    assert (abs(variables["vegetation_index"]) <= 1).all()
    with pytest.raises(ValueError, match="5 channels"):
        variables["pipe"](num_inference_steps=2)
    draw("bands")


def test_vorticity():
    variables = run_section("A field of floating point numbers")

    for model in ("vorticity", "vorticity-table"):
        assert saved_format(model) == ImageFormat("L", 1, (-60, 60), None)
    # The same values from files and from a column of nested lists.
    table = make_images.make_images("vorticity", NUM_IMAGES)
    for path, values in zip(files("data/vorticity", "npy"), table, strict=True):
        np.testing.assert_array_equal(np.load(path), values)
    assert variables["vorticity"].shape == (NUM_IMAGES, 32, 32)
    for values in (variables["vorticity"], variables["more"]):
        assert values.dtype == np.float32
        assert -60 <= values.min() < -1 < 1 < values.max() <= 60
    draw("vorticity")


def test_spectrograms():
    variables = run_section("Spectrograms of 64 x 256")

    assert saved_format("spectrograms") == ImageFormat("L", 1, (0, 255), 256)
    assert saved_unet("spectrograms")["sample_size"] == [64, 256]
    for path in files("spectrograms-samples", "png"):
        with Image.open(path) as image:
            assert (image.mode, image.size) == ("L", (256, 64))
    assert variables["decibel"].shape == (64, 256)
    assert -80 <= variables["decibel"].min() <= variables["decibel"].max() <= 0
    arguments = yaml.safe_load(Path("runs/spectrograms/train_args.yaml").read_text())
    assert arguments["resolution"] == "64x256"
    draw("spectrograms")


def test_all_commands_of_the_guide_run():
    """No section of the guide is left out, and all changes are used."""
    tested = ("Grey scans of 12 bits", "Satellite images of five bands", "A field of floating point numbers")
    tested += ("Spectrograms of 64 x 256",)
    assert sum(len(section(name)) for name in tested) == len(blocks(GUIDE))
    code = "".join(block.code.replace("\\\n", " ") for block in blocks(GUIDE))
    for pattern in CHANGES:
        assert re.search(pattern, re.sub(r" +", " ", code)), f"No block has {pattern}"


def test_the_figures_are_small():
    figures = [REPOSITORY / "docs" / "images" / f"own_{kind}.png" for kind in make_images.KINDS]
    assert all(path.stat().st_size < 150_000 for path in figures)


# The example images themselves


@pytest.mark.parametrize(
    "kind, shape, dtype, low, high",
    [
        ("scans", (32, 32), np.uint16, 0, 4095),
        ("bands", (32, 32, 5), np.uint16, 0, 10000),
        ("vorticity", (32, 32), np.float32, -72, 72),
        ("spectrograms", (64, 256), np.uint8, 0, 255),
    ],
)
def test_example_images_depend_only_on_seed_and_number(kind, shape, dtype, low, high):
    images = make_images.make_images(kind, 5, seed=3)
    for image in images:
        assert (image.shape, image.dtype) == (shape, dtype)
        assert low <= image.min() < image.max() <= high
    np.testing.assert_array_equal(make_images.make_images(kind, 3, seed=3), images[:3])
    assert not np.array_equal(make_images.make_images(kind, 1, seed=4)[0], images[0])
    assert not np.array_equal(images[0], images[1])


def test_vorticity_has_its_spectrum():
    """Against the definition: k**-3 for each mode, normalised; and Parseval's theorem."""
    import draw_own_images

    assert (draw_own_images.MAX_WAVE_NUMBER, draw_own_images.VORTICITY_STD) == (
        make_images.MAX_WAVE_NUMBER,
        make_images.VORTICITY_STD,
    )
    fields = np.stack(make_images.make_images("vorticity", 400)).astype(np.float64)
    size, cutoff = fields.shape[-1], make_images.MAX_WAVE_NUMBER
    expected = np.zeros(size // 2 + 1)
    for row in range(-cutoff, cutoff + 1):
        for column in range(-cutoff, cutoff + 1):
            wave_number = (row**2 + column**2) ** 0.5
            if 0 < wave_number <= cutoff:
                expected[round(wave_number)] += wave_number**-3
    expected *= make_images.VORTICITY_STD**2 / expected.sum()
    spectrum = draw_own_images.enstrophy_spectrum(fields)

    assert abs(fields.mean(axis=(1, 2))).max() < 1e-5  # float32
    np.testing.assert_allclose(spectrum.sum(), (fields**2).mean(), rtol=1e-6)
    np.testing.assert_allclose(spectrum[1 : cutoff + 1], expected[1 : cutoff + 1], rtol=0.2)  # 2 modes, 400 fields: 5%
    assert spectrum[cutoff + 1 :].max() < 1e-9


def test_bands_are_correlated():
    """More leaves: less red, more near infrared. Water reflects little in all bands."""
    bands = np.stack(make_images.make_images("bands", 40)).reshape(-1, 5).astype(float)
    land = bands[bands[:, 4] > 600]
    correlation = np.corrcoef(land.T)
    assert correlation[0, 1] > 0.8
    assert correlation[2, 4] < -0.3
    assert 0.005 < 1 - len(land) / len(bands) < 0.2


def test_example_images_of_another_size():
    assert make_images.make_images("scans", 1, size=48)[0].shape == (48, 48)
    with pytest.raises(SystemExit, match="spectrograms are not square"):
        make_images.make_images("spectrograms", 1, size=48)


def test_script_prints_what_it_made(tmp_path, capsys):
    make_images.main(["--kind", "scans", "--num_images", "2", "--output_dir", str(tmp_path / "scans")])
    values = [np.array(Image.open(path)) for path in sorted((tmp_path / "scans").iterdir())]
    assert capsys.readouterr().out == f"2 images (32, 32), uint16, {np.min(values)} to {np.max(values)}\n"
    assert {value.dtype for value in values} == {np.dtype(np.uint16)}
