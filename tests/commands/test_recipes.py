"""Recipes that are installed with the package: their names, and the paths in them."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from diffusers_adm.commands import recipes
from diffusers_adm.commands.arguments import given_arguments


CONFIGS = Path(__file__).resolve().parents[2] / "training" / "configs"


@dataclass
class Arguments:
    model_config_name_or_path: str | None = None
    data_files: list[str] | None = None
    vae: str | None = None


def test_installed_ones_are_those_of_the_clone():
    assert recipes.installed_configs() == CONFIGS
    names = recipes.recipe_names()
    assert {"emoji_32", "small", "openai/lsun_cat"} <= set(names)
    assert not [name for name in names if "accelerate" in name]


@pytest.fixture
def given(tmp_path, monkeypatch):
    """In a folder that is no clone; `written`: content of the installed recipe `mine`."""
    (tmp_path / "installed").mkdir()
    (tmp_path / "here").mkdir()
    (tmp_path / "installed" / "net.json").touch()
    monkeypatch.setattr(recipes, "installed_configs", lambda: tmp_path / "installed")
    monkeypatch.chdir(tmp_path / "here")

    def given(written, *arguments, recipe="mine"):
        (tmp_path / "installed" / "mine.yaml").write_text(written)
        return given_arguments([Arguments], ["--config", recipe, *arguments])

    return given


def test_paths_of_network_configs_are_found(given, tmp_path):
    recipe = "model_config_name_or_path: training/configs/net.json\nvae: runs/vae"
    installed = str(tmp_path / "installed" / "net.json")
    assert given(recipe) == {"model_config_name_or_path": installed, "vae": "runs/vae"}
    assert given(recipe, "--model_config_name_or_path", "x")["model_config_name_or_path"] == "x"
    here = Path("training/configs/net.json")
    here.parent.mkdir(parents=True)
    here.touch()  # in a clone
    assert given(recipe)["model_config_name_or_path"] == str(here)
    absent = "model_config_name_or_path: training/configs/other.json"
    assert given(absent)["model_config_name_or_path"] == "training/configs/other.json"


def test_what_only_a_clone_has(given):
    recipe = "data_files:\n- data/a.parquet\nvae: spaces/model/vae\n"
    with pytest.raises(ValueError, match="'mine' sets `data_files` to 'data/a.parquet', .*clone.* your own `--data_f"):
        given(recipe)
    with pytest.raises(ValueError, match="sets `vae` to 'spaces/model/vae'"):
        given(recipe, "--data_files", "b.parquet")
    assert given(recipe, "--data_files", "none", "--vae", "x") == {"data_files": None, "vae": "x"}
    for path in (Path("data/a.parquet"), Path("spaces/model/vae")):
        path.parent.mkdir(parents=True)
        path.touch()
    assert given(recipe) == {"data_files": ["data/a.parquet"], "vae": "spaces/model/vae"}


def test_a_file_comes_before_a_name(given, tmp_path):
    """Data of a file need no clone; network configs are found, as a run's `train_args.yaml` needs it."""
    Path("mine").write_text("data_files: data/a.parquet\nmodel_config_name_or_path: training/configs/net.json")
    installed = str(tmp_path / "installed" / "net.json")
    assert given("vae: x") == {"data_files": ["data/a.parquet"], "model_config_name_or_path": installed}


def test_records_do_not_depend_on_the_place_of_the_package(given, tmp_path):
    installed = given("model_config_name_or_path: training/configs/net.json")["model_config_name_or_path"]
    assert recipes.portable(installed) == "training/configs/net.json"
    for other in (None, 3, "", "vae", "training/configs/net.json", str(tmp_path / "net.json"), [installed]):
        assert recipes.portable(other) == other
    here = Path("training/configs/net.json")
    here.parent.mkdir(parents=True)
    here.touch()  # which the name would stand for
    assert recipes.portable(installed) == installed


def test_paths_into_an_environment_that_is_gone(given, tmp_path):
    former = tmp_path / "former" / "site-packages" / "diffusers_adm" / "scripts" / "configs"
    installed = str(tmp_path / "installed" / "net.json")
    assert given(f"vae: {former / 'net.json'}") == {"vae": installed}
    # Not those of another package, of a version that had another file, or on the command line.
    others = [str(tmp_path / "diffusers_adm" / "net.json"), str(former / "other.json")]
    for other in others:
        assert given(f"vae: {other}") == {"vae": other}
    assert given("vae: x", "--vae", str(former / "net.json")) == {"vae": str(former / "net.json")}
    former.mkdir(parents=True)
    (former / "net.json").touch()  # an environment that is still there
    assert given(f"vae: {former / 'net.json'}") == {"vae": str(former / "net.json")}


def test_unknown_names(given):
    with pytest.raises(ValueError, match="`--config` is 'mien', which is not a file.*Did you mean `mine`"):
        given("vae: x", recipe="mien")


def test_configs_of_accelerate(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    installed = str(CONFIGS / "accelerate_two_cpu_processes.yaml")
    assert recipes.find_accelerate_config("accelerate_two_cpu_processes") == installed
    assert recipes.find_accelerate_config("accelerate_two_cpu_processes.yaml") == installed
    Path("accelerate_two_cpu_processes.yaml").touch()
    for name in ("accelerate_two_cpu_processes.yaml", "accelerate_absent", "emoji_32", None):
        assert recipes.find_accelerate_config(name) == name
