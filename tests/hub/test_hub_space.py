"""`python -m diffusers_adm.hub push-space`: what arrives on the Hub, and that the app runs with it alone."""

import hashlib
import io
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from hub_server import HubServer
from packaging.requirements import Requirement
from toy_models import CONDITIONAL, random_text_encoder, random_text_unet, toy_tokenizer

from diffusers_adm import ADMPipeline, LearnedVarianceDDPMScheduler, __version__
from diffusers_adm.hub.space import SOURCES, find_clone


ROOT = Path(__file__).parents[2]
WHEEL = f"diffusers_adm-{__version__}-py3-none-any.whl"
PUSH = """
import os, sys
from huggingface_hub import CommitOperationAdd, HfApi, snapshot_download
from diffusers_adm.hub.__main__ import main
clone, models, empty = sys.argv[1:]
os.chdir(clone)
mine = ["--models", models, "--token", "token-of-alice"]
main(["push-space", "alice/demo", *mine, "--commit_message", "First"])
hub = HfApi(token="token-of-alice")
old = ["diffusers_adm-0.0.9-py3-none-any.whl", "model/base/old.json", "notes.txt"]
operations = [CommitOperationAdd(name, b"old") for name in old]
hub.create_commit("alice/demo", operations, commit_message="Of an earlier push", repo_type="space")
main(["push-space", "demo", *mine, "--commit_message", "Second"])
main(["push-space", "alice/hidden", *mine, "--private", "--create_pr"])
try:
    main(["push-space", "alice/refused", "--models", empty, "--token", "token-of-alice"])
except ValueError as error:
    assert "model_index.json" in str(error), error
else:
    raise SystemExit("nothing was refused")
snapshot_download("alice/demo", repo_type="space", local_dir="../demo")
"""
# As the Hub does it: `python app.py` in the folder of the Space, but without serving it.
BUILD = """
import sys
from pathlib import Path
folder, package = map(Path, sys.argv[1:])
sys.path[:0] = [str(folder), str(package)]
import diffusers_adm
assert Path(diffusers_adm.__file__).is_relative_to(package), diffusers_adm.__file__
from diffusers_adm import pipelines
assert Path(pipelines.__file__).is_relative_to(package), pipelines.__file__
import app
assert Path(app.__file__).parent == folder, app.__file__
app.EXAMPLES = (app.Recipe("fire", sampler="DDIM", steps=2, num_images=1),)  # they are drawn at the start
assert Path(app.MODELS) == folder / "model"
page = app.build(app.Models(app.MODELS))
print("built", [function.api_name for function in page.fns.values()])
"""


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """The server, what the clients said, and the folder that holds the Spaces as downloaded."""
    folder = tmp_path_factory.mktemp("space")
    (folder / "clone").mkdir()
    for name in (*SOURCES, "spaces"):
        if (ROOT / name).is_dir():
            leave_out = shutil.ignore_patterns("model", "__pycache__", "*.egg-info")  # a folder `model`: of the Space
            shutil.copytree(ROOT / name, folder / "clone" / name, ignore=leave_out)
        else:
            shutil.copyfile(ROOT / name, folder / "clone" / name)
    unet = random_text_unet("added_kv", **CONDITIONAL)
    ADMPipeline(
        unet=unet,
        scheduler=LearnedVarianceDDPMScheduler(),
        vae=None,
        text_encoder=random_text_encoder(),
        tokenizer=toy_tokenizer(),
        classifier=None,
        id2label={0: "cats", 1: "dogs", 2: "hats", 3: "mats"},
    ).save_pretrained(folder / "models" / "base")
    (folder / "models" / "base" / "checkpoint-10").mkdir()
    (folder / "models" / "base" / "checkpoint-10" / "optimizer.bin").write_bytes(b"0")
    (folder / "empty").mkdir()
    with HubServer() as hub:
        arguments = (folder / "clone", folder / "models", folder / "empty")
        hub.run_client(PUSH, *arguments, cache=folder / "cache")
        yield hub, folder


class TestPushed:
    def test_space_and_its_commits(self, pushed):
        hub, _ = pushed
        space = hub.repositories["spaces/alice/demo"]
        assert (space.sdk, space.private) == ("gradio", False)
        assert hub.repositories["spaces/alice/hidden"].private
        assert "spaces/alice/refused" not in hub.repositories
        assert [commit.message for commit in space.commits.values()] == [
            "initial",
            "First",
            "Of an earlier push",
            "Second",
        ]
        assert "refs/pr/1" in hub.repositories["spaces/alice/hidden"].refs

    def test_files(self, pushed):
        hub, _ = pushed
        space = hub.repositories["spaces/alice/demo"]
        first, second = (c.files for c in space.commits.values() if c.message in ("First", "Second"))
        app = {"app.py", "space_models.py", "space_server.py", "README.md", "requirements.txt", WHEEL, ".gitattributes"}
        assert {name for name in first if not name.startswith("model/")} == app
        assert "model/base/unet/diffusion_pytorch_model.safetensors" in first
        assert not [name for name in first if "checkpoint" in name or "__pycache__" in name]
        # What somebody added stays; old wheels and models go. The same sources give the same wheel.
        assert {name: blob for name, blob in second.items() if name != "notes.txt"} == first
        assert "notes.txt" in second

    def test_a_private_space_holds_what_is_in_the_wheel(self, pushed):
        hub, _ = pushed
        hidden = hub.files("spaces/alice/hidden", "refs/pr/1")
        with zipfile.ZipFile(io.BytesIO(hub.files("spaces/alice/demo")[WHEEL])) as wheel:
            package = {name: wheel.read(name) for name in wheel.namelist() if ".dist-info/" not in name}
        # The app needs no command line.
        package = {name: data for name, data in package.items() if not name.startswith("diffusers_adm_cli/")}
        assert {name: data for name, data in hidden.items() if name.startswith("diffusers_adm")} == package
        assert {"diffusers_adm/__init__.py", "diffusers_adm/pipelines/pipeline_adm.py"} < set(package)

    def test_requirements_name_the_wheel_and_its_hash(self, pushed):
        hub, _ = pushed
        files = hub.files("spaces/alice/demo")
        lines = files["requirements.txt"].decode().splitlines()
        digest = hashlib.sha256(files[WHEEL]).hexdigest()
        assert lines[-1] == f"{hub.endpoint}/spaces/alice/demo/resolve/main/{WHEEL}#sha256={digest}"
        assert (ROOT / "spaces" / "requirements.txt").read_text().strip() in "\n".join(lines)

    def test_private_requirements_are_those_of_the_package(self, pushed):
        lines = pushed[0].files("spaces/alice/hidden", "refs/pr/1")["requirements.txt"].decode().splitlines()
        named = {Requirement(line).name for line in lines if not line.startswith(("#", "--"))}
        assert {"torch", "diffusers", "transformers", "gradio"} <= named
        assert not {"pytest", "ruff", "torch-fidelity"} & named

    def test_gradio_of_the_metadata_is_in_the_range(self):
        metadata = yaml.safe_load((ROOT / "spaces" / "README.md").read_text().split("---\n")[1])
        lines = (ROOT / "spaces" / "requirements.txt").read_text().splitlines()
        (gradio,) = [r for r in map(Requirement, (line for line in lines if line[0] != "#")) if r.name == "gradio"]
        assert metadata["sdk_version"] in gradio.specifier
        project = (ROOT / "pyproject.toml").read_text()
        assert metadata["python_version"] == re.search(r'requires-python = ">=([\d.]+)"', project)[1]

    def test_the_app_builds_with_what_pip_installs(self, pushed, tmp_path):
        pytest.importorskip("gradio", reason="The page needs Gradio: pip install -r spaces/requirements.txt")
        hub, folder = pushed
        line = (folder / "demo" / "requirements.txt").read_text().splitlines()[-1]
        # Where the Hub builds a Space, there is this file and nothing else, and nobody is logged in.
        command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-cache-dir", "--target"]
        environment = {"NO_PROXY": "127.0.0.1", "PATH": "", "PIP_CONFIG_FILE": "/dev/null"}
        done = subprocess.run(
            [*command, tmp_path / "installed", line], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        offline = {"GRADIO_ANALYTICS_ENABLED": "False"}
        said = hub.run_client(BUILD, folder / "demo", tmp_path / "installed", cache=folder / "cache", env=offline)
        assert "'generate'" in said


class TestRefused:
    def test_no_clone(self, tmp_path):
        with pytest.raises(ValueError, match="no clone of the repository"):
            find_clone(tmp_path)


def test_the_clone_is_found_from_the_imported_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_clone() == ROOT
