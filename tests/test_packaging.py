"""
What gets installed, checked on real builds: the editable install, the wheel, and the wheel built from a source
distribution. The top-level folders `pipelines/` and `training/` must arrive as `diffusers_adm.pipelines` and
`diffusers_adm.scripts` in all three.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import diffusers_adm


ROOT = Path(__file__).parents[1]
# Where a folder of the repository lands in an installation. Nothing but these may be installed.
INSTALLED = {
    "src/diffusers_adm": "diffusers_adm",
    "pipelines": "diffusers_adm/pipelines",
    "training": "diffusers_adm/scripts",
    "src/diffusers_adm_cli": "diffusers_adm_cli",
}


def installed_files(root: Path) -> set[str]:
    """Every file that an installation of the tree at `root` should hold, `.dist-info` aside."""
    return {
        (Path(target) / path.relative_to(root / folder)).as_posix()
        for folder, target in INSTALLED.items()
        for path in (root / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def run(*args, cwd: Path, **env: str) -> str:
    result = subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=cwd,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result.stdout


def build_wheel(source: Path, target: Path) -> Path:
    """Builds offline, with the setuptools of this environment."""
    run("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", target, source, cwd=target)
    (wheel,) = target.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """
    A copy of the repository to build from: a build writes into its tree, and an old `build/` there would bring modules
    back that have been deleted since.
    """
    tree = tmp_path_factory.mktemp("tree") / "diffusers-adm"
    leave_out = shutil.ignore_patterns(".git", ".venv*", "build", "dist", "outputs", "*.egg-info", ".*_cache")
    shutil.copytree(ROOT, tree, ignore=leave_out)
    # What running the code leaves behind must not count as a package.
    (tree / "pipelines" / "__pycache__").mkdir(exist_ok=True)
    (tree / "pipelines" / "__pycache__" / "left_over.cpython-311.pyc").write_bytes(b"")
    return tree


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory) -> Path:
    return build_wheel(tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tree, tmp_path_factory) -> Path:
    """The unpacked source distribution."""
    target = tmp_path_factory.mktemp("sdist")
    run("-c", f"from setuptools import build_meta; build_meta.build_sdist({str(target)!r})", cwd=tree)
    (archive,) = target.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(target, filter="data")
    return target / archive.name.removesuffix(".tar.gz")


class TestEditableInstall:
    def test_package_comes_from_src(self):
        assert Path(diffusers_adm.__file__) == ROOT / "src" / "diffusers_adm" / "__init__.py"

    def test_pipelines_come_from_the_top_level_folder(self):
        pipelines = importlib.import_module("diffusers_adm.pipelines")
        assert Path(pipelines.__file__) == ROOT / "pipelines" / "__init__.py"

    def test_scripts_come_from_the_top_level_folder(self):
        spec = importlib.util.find_spec("diffusers_adm.scripts.train_adm")
        assert Path(spec.origin) == ROOT / "training" / "train_adm.py"

    def test_version_is_the_installed_one(self):
        assert importlib.metadata.version("diffusers-adm") == diffusers_adm.__version__


class TestWheel:
    def test_holds_exactly_these_folders(self, tree, wheel):
        names = set(zipfile.ZipFile(wheel).namelist())
        files = {name for name in names if ".dist-info/" not in name}
        assert files == installed_files(tree)
        assert {"diffusers_adm/py.typed", "diffusers_adm/pipelines/__init__.py"} <= files
        configs = {"unet_emoji_32.json", "emoji_32.yaml", "openai/lsun_cat.yaml"}
        assert {f"diffusers_adm/scripts/configs/{name}" for name in configs} <= files

    def test_every_folder_of_modules_is_a_package(self, tree):
        folders = {Path(name).parent for name in installed_files(tree) if name.endswith(".py")}
        without_init = {folder for folder in folders if f"{folder.as_posix()}/__init__.py" not in installed_files(tree)}
        assert not without_init, f"add an __init__.py to {sorted(map(str, without_init))}"

    def test_a_new_sub_package_needs_no_entry_in_pyproject(self, tree, tmp_path):
        copy = tmp_path / "copy"
        shutil.copytree(tree, copy, ignore=shutil.ignore_patterns("data", "tests", "build", "*.egg-info"))
        for package in ("src/diffusers_adm/brand_new/inner", "pipelines/brand_new"):
            (copy / package).mkdir(parents=True)
            (copy / package / "__init__.py").touch()
            (copy / package / "module.py").touch()
        target = tmp_path / "wheel"
        target.mkdir()
        names = set(zipfile.ZipFile(build_wheel(copy, target)).namelist())
        assert installed_files(copy) <= names
        assert {"diffusers_adm/brand_new/inner/module.py", "diffusers_adm/pipelines/brand_new/module.py"} <= names

    def test_metadata(self, wheel):
        archive = zipfile.ZipFile(wheel)
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = archive.read(name).decode()
        assert f"\nVersion: {diffusers_adm.__version__}\n" in metadata
        assert "\nLicense-Expression: Apache-2.0\n" in metadata
        assert name.replace("METADATA", "licenses/LICENSE") in archive.namelist()

    def test_imports_without_the_repository(self, wheel, tmp_path):
        site = tmp_path / "site"
        zipfile.ZipFile(wheel).extractall(site)
        # The editable install of this environment could stand in for what the wheel lacks: its finder is removed, and
        # every module says where it came from.
        code = (
            "import json, sys\n"
            "is_editable = lambda finder: getattr(finder, '__module__', '').startswith('__editable__')\n"
            "sys.meta_path = [finder for finder in sys.meta_path if not is_editable(finder)]\n"
            "import diffusers_adm, diffusers_adm.pipelines\n"
            "names = [name for name in sys.modules if name.split('.')[0] == 'diffusers_adm']\n"
            "print(json.dumps({name: sys.modules[name].__file__ for name in names}))\n"
        )
        output = run("-P", "-c", code, cwd=tmp_path, PYTHONPATH=str(site))
        files = json.loads(output.splitlines()[-1])
        assert {"diffusers_adm", "diffusers_adm.pipelines"} <= files.keys()
        outside = {name: file for name, file in files.items() if not Path(file).is_relative_to(site)}
        assert not outside

    @pytest.mark.slow
    def test_trains_without_the_repository(self, wheel, tree, tmp_path):
        """The scripts and their recipes, started from another folder."""
        site = tmp_path / "site"
        run("-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", site, wheel, cwd=tmp_path)
        assert (site / "bin" / "diffusers-adm").is_file()
        data = tree / "data" / "noto-emoji-32" / "test.parquet"
        arguments = ["--config", "emoji_32", "--data_files", data, "--no_check_images", "--output_dir", "run"]
        arguments += ["--max_train_steps", 2, "--train_batch_size", 2, "--report_to", "none"]
        arguments += ["--num_validation_images", 1, "--validation_num_inference_steps", 1]
        launch = ["-m", "accelerate.commands.launch", "-m", "diffusers_adm.scripts.train_adm"]
        environment = {"PYTHONPATH": str(site), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        run(*launch, *arguments, cwd=tmp_path, **environment)
        rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        assert json.loads(rows[-1])["step"] == 2
        recorded = (tmp_path / "run" / "train_args.yaml").read_text()
        # The network was found in the wheel, in whatever place that is.
        assert "model_config_name_or_path: training/configs/unet_emoji_32.json\n" in recorded
        assert (tmp_path / "run" / "unet" / "diffusion_pytorch_model.safetensors").is_file()


class TestSourceDistribution:
    def test_builds_the_same_wheel(self, sdist, wheel, tmp_path):
        rebuilt = zipfile.ZipFile(build_wheel(sdist, tmp_path))
        original = zipfile.ZipFile(wheel)
        assert set(rebuilt.namelist()) == set(original.namelist())
        for name in original.namelist():
            if not name.endswith("/RECORD"):
                assert rebuilt.read(name) == original.read(name), name

    @pytest.mark.parametrize("folder", ["tests", "training", "data", "benchmarks", "spaces", ".ci"])
    def test_holds_what_the_commands_need(self, tree, sdist, folder):
        def files(root: Path) -> set[str]:
            paths = (root / folder).rglob("*")
            return {p.relative_to(root).as_posix() for p in paths if p.is_file() and "__pycache__" not in p.parts}

        assert files(sdist) == files(tree)

    def test_holds_the_files_beside_the_package(self, sdist):
        documents = ("LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
        for name in ("Makefile", "constraints.txt", *documents):
            assert (sdist / name).is_file(), name


def normalised(name: str) -> str:
    return name.lower().replace("_", "-")


class TestDependencies:
    @pytest.fixture
    def pins(self) -> dict[str, str]:
        lines = (ROOT / "constraints.txt").read_text().splitlines()
        pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
        pins = {normalised(name): version for name, version in pairs}
        assert len(pins) == len(pairs), "a package is pinned twice"
        return pins

    def test_pins_hold_in_every_package_index(self, pins):
        """A local version such as 2.13.0+cpu exists in one index only."""
        assert not {name: version for name, version in pins.items() if "+" in version}

    def test_every_dependency_is_pinned_within_its_range(self, pins):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        declared = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
        for requirement in map(Requirement, declared):
            if requirement.name != project["name"]:
                assert pins[normalised(requirement.name)] in requirement.specifier, str(requirement)

    def test_whatever_is_installed_is_pinned(self, pins):
        """At any depth below the dependencies of the project."""
        if importlib.metadata.version("torch").partition("+")[0] != pins["torch"]:
            pytest.skip("this environment was not installed with constraints.txt")
        seen, unpinned = set(), set()
        queue = [("diffusers-adm", ""), ("diffusers-adm", "test")]
        while queue:
            name, extra = node = queue.pop()
            if node in seen:
                continue
            seen.add(node)
            if name != "diffusers-adm" and name not in pins:
                unpinned.add(name)
            for requirement in map(Requirement, importlib.metadata.requires(name) or []):
                if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                    queue += [(normalised(requirement.name), child) for child in ("", *requirement.extras)]
        assert {"torch", "datasets", "pytest"} <= {name for name, _ in seen}
        assert not unpinned
