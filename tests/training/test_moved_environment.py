"""Runs of installed recipes, resumed after the environment has moved: real copies of the package, in other folders."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from runs import EMOJI, SHORT_RUN, flags
from scripts import REPOSITORY
from toy_models import TOY_CONFIG

from diffusers_adm.training.manifest import write_manifest


PACKAGE = {"src/diffusers_adm": ".", "pipelines": "pipelines", "training": "scripts"}
NETWORK = "training/configs/unet_toy.json"
INSTALLED = "diffusers_adm/scripts/configs/unet_toy.json"


def install(site):
    """Copies the package as a wheel would, with a recipe of a toy."""
    for source, target in PACKAGE.items():
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / source, site / "diffusers_adm" / target, ignore=ignored, dirs_exist_ok=True)
    configs = site / "diffusers_adm" / "scripts" / "configs"
    (configs / "unet_toy.json").write_text(json.dumps(TOY_CONFIG))
    values = SHORT_RUN | {"model_config_name_or_path": NETWORK, "max_train_samples": 16}
    (configs / "toy.yaml").write_text(yaml.safe_dump(values | {"resolution": 8, "checkpointing_steps": 1}))
    return site


def train(site, folder, **arguments):
    """The script of the package in `site`, from a folder that is no clone; its exit code, and what it printed."""
    # The editable install of this environment must not stand in for the copy.
    code = (
        "import sys, diffusers_adm.scripts.train_adm as script; from diffusers_adm.commands.errors import run_command; "
    )
    code += f"assert script.__file__.startswith({str(site)!r}), script.__file__; run_command(script.main)"
    environment = os.environ | {"PYTHONPATH": str(site), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-P", "-c", code, *flags(**arguments)]
    result = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    return result.returncode, result.stdout + result.stderr


def recorded(path):
    return yaml.safe_load((path / "train_args.yaml").read_text())["model_config_name_or_path"]


def record(checkpoint, path):
    """Gives a checkpoint another path of its network, as an earlier version has recorded it."""
    settings = yaml.safe_load((checkpoint / "train_args.yaml").read_text())
    (checkpoint / "train_args.yaml").write_text(yaml.safe_dump(settings | {"model_config_name_or_path": str(path)}))
    write_manifest(checkpoint)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run whose environment has moved since; the former place of the package, and that of now."""
    root = tmp_path_factory.mktemp("environments")
    former, now = root / "former" / "site-packages", root / "now" / "site-packages"
    code, printed = train(install(former), root, config="toy", data_files=EMOJI, output_dir="run")
    assert code == 0, printed
    now.parent.mkdir()
    former.rename(now)
    return root, former, now


@pytest.fixture
def run(begun, tmp_path):
    root, former, now = begun
    shutil.copytree(root / "run", tmp_path / "run")
    return tmp_path / "run", former, now


def resume(site, run, **arguments):
    arguments = {"output_dir": "run", "resume_from_checkpoint": "latest", "max_train_steps": 3} | arguments
    return train(site, run.parent, **arguments)


def test_the_record_names_no_environment(run):
    folder, former, _ = run
    for path in (folder, folder / "checkpoint-1", folder / "checkpoint-2"):
        assert recorded(path) == NETWORK
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if os.fsencode(former) in path.read_bytes()]  # nor do the trackers' files


@pytest.mark.parametrize("recorded_by", ["this version", "an earlier one"])
def test_resumed_without_the_recipe(run, recorded_by):
    folder, former, now = run
    if recorded_by == "an earlier one":
        record(folder / "checkpoint-2", former / INSTALLED)
    code, printed = resume(now, folder)
    assert code == 0, printed
    assert (folder / "checkpoint-3").is_dir()
    assert recorded(folder) == recorded(folder / "checkpoint-3") == NETWORK


def test_resumed_with_the_recipe_of_another_copy_of_the_package(run, tmp_path):
    """The path of an earlier version still exists, in an environment that is there as well."""
    folder, _, now = run
    other = install(tmp_path / "other")
    record(folder / "checkpoint-2", now / INSTALLED)
    code, printed = resume(other, folder, config="toy", data_files=EMOJI)
    assert code == 0, printed
    assert recorded(folder / "checkpoint-3") == NETWORK


def test_the_record_as_the_next_recipe(run):
    folder, _, now = run
    code, printed = train(now, folder.parent, config="run/train_args.yaml", output_dir="next", max_train_steps=1)
    assert code == 0, printed
    assert recorded(folder.parent / "next") == NETWORK


def test_a_file_that_the_new_environment_lacks(run):
    folder, former, now = run
    gone = former / "diffusers_adm" / "scripts" / "configs" / "unet_gone.json"
    record(folder / "checkpoint-2", gone)
    code, printed = resume(now, folder)
    assert code == 2, printed
    assert f"`model_config_name_or_path` of checkpoint-2 is '{gone}', which was installed with diffusers-adm" in printed
    assert "pass `--model_config_name_or_path` with the path of a copy" in printed
    assert "Traceback" not in printed
    assert not (folder / "checkpoint-3").exists()
    copy = Path(folder.parent, "copy.json")
    copy.write_text(json.dumps(TOY_CONFIG))
    code, printed = resume(now, folder, model_config_name_or_path="copy.json")
    assert code == 0, printed
    assert recorded(folder / "checkpoint-3") == "copy.json"
