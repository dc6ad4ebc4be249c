"""
The Space of this package on the Hub: `python -m diffusers_adm.hub push-space USER/NAME`, from a clone.

The clone has the app in `spaces/`; a wheel of its sources is built and pushed with the app. When the Hub builds a
Space, pip sees only `requirements.txt`. So that file names the wheel by its address on the Hub, with its hash: without
it, the Hub would reuse what it built for an earlier wheel of the same name. pip cannot download the wheel of a private
Space, so there the package lies unpacked next to the app.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from email import message_from_string
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi

from .public_classes import PACKAGE


APP_FILES = ("app.py", "space_models.py", "space_server.py", "README.md")
REQUIREMENTS = "requirements.txt"
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "src", "pipelines", "training")  # of the wheel
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
# 1 January 1980 in seconds since 1970, the first date that a wheel can hold. With the current date, each build would
# give another file.
BUILD_DATE = 315532800
# A Space has no GPU unless one is paid for, and the wheels of torch with CUDA take some gigabytes.
CPU_TORCH = "--extra-index-url https://download.pytorch.org/whl/cpu"
STALE = ["*.whl", f"{PACKAGE}/*", "model/*"]  # from earlier pushes, unless this one writes them again


def push_space(
    repo_id: str,
    models: str | Path | None = None,
    *,
    clone: str | Path | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
) -> CommitInfo:
    r"""
    Push the app, a folder of models and a wheel of this package as a Gradio Space, in one commit. The Space is created
    if necessary.

    Args:
        repo_id (`str`): `user/name`, or `name` for the owner of the token.
        models (`str` or `Path`, *optional*): Contains `base/` and optionally `latents/`, `upsampler/`,
            `unclip/`, `controlnet/` and `controlnet_latents/` (see spaces/README.md). Defaults to `spaces/model` of the
            clone.
        clone (`str` or `Path`, *optional*): Clone of the repository of this package. Defaults to the working directory,
            or else to the place that the package was imported from.
        private (`bool`, *optional*): Whether a new Space is private. An existing one stays as it is.
        create_pr (`bool`): Whether to open a pull request.
        commit_message (`str`, *optional*), token (`str`, *optional*): See `push_to_hub`.

    Returns:
        `huggingface_hub.CommitInfo`: With `pr_url` for `create_pr`.

    Raises:
        ValueError: If there is no clone or no model, or the wheel cannot be built. Nothing has been uploaded then.
        huggingface_hub.errors.HfHubHTTPError: If the Hub refuses.
    """
    clone = find_clone(clone)
    models = clone / "spaces" / "model" if models is None else Path(models)
    if not (models / "base" / "model_index.json").is_file():
        raise ValueError(f"{models} contains no base/model_index.json, the pipeline of the Space. Pass another folder.")
    hub = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        staged = Path(folder, "space")
        staged.mkdir()
        for name in APP_FILES:
            shutil.copyfile(clone / "spaces" / name, staged / name)
        shutil.copytree(models, staged / "model", ignore=shutil.ignore_patterns("checkpoint-*", "logs", "__pycache__"))
        wheel = build_wheel(clone, Path(folder, "wheel"))
        made = hub.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        lines = [(clone / "spaces" / REQUIREMENTS).read_text(encoding="utf-8").strip(), CPU_TORCH]
        if hub.repo_info(made.repo_id, repo_type="space").private:
            lines += _unpack(wheel, staged)
        else:
            shutil.copyfile(wheel, staged / wheel.name)
            digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
            lines.append(f"{hub.endpoint}/spaces/{made.repo_id}/resolve/main/{wheel.name}#sha256={digest}")
        (staged / REQUIREMENTS).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return hub.upload_folder(
            repo_id=made.repo_id,
            repo_type="space",
            folder_path=staged,
            delete_patterns=STALE,
            commit_message=commit_message or "Upload the Space with diffusers-adm",
            create_pr=create_pr,
        )


def find_clone(clone: str | Path | None = None) -> Path:
    """
    Find a clone of the repository: `clone`, or else the working directory or the home of the imported package.

    Raises:
        ValueError: If there is none.
    """
    places = [Path.cwd(), Path(__file__).parents[3]] if clone is None else [Path(clone)]
    wanted = [*SOURCES, f"src/{PACKAGE}", f"spaces/{REQUIREMENTS}", *(f"spaces/{name}" for name in APP_FILES)]
    for place in places:
        if all((place / name).exists() for name in wanted):
            return place
    raise ValueError(
        f"{' and '.join(map(str, places))}: no clone of the repository of diffusers-adm. The app of the Space is in "
        "its folder `spaces`, which an installed package lacks. Run this in a clone."
    )


def build_wheel(clone: Path, target: Path) -> Path:
    """
    Build the wheel of the sources in a clone, offline. The same sources give the same file.

    Raises:
        ValueError: If setuptools cannot build it.
    """
    # A build writes into its tree, and includes leftovers of an older one.
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in SOURCES:
            if (clone / name).is_dir():
                leave_out = shutil.ignore_patterns("__pycache__", "*.egg-info")
                shutil.copytree(clone / name, tree / name, ignore=leave_out)
            else:
                shutil.copyfile(clone / name, tree / name)
        for path in tree.rglob("*"):
            os.utime(path, (BUILD_DATE, BUILD_DATE))
        target.mkdir(parents=True, exist_ok=True)
        built = subprocess.run(
            [sys.executable, "-c", BUILD, str(target)],
            cwd=tree,
            env={**os.environ, "SOURCE_DATE_EPOCH": str(BUILD_DATE)},
            capture_output=True,
            text=True,
        )
    if built.returncode:
        raise ValueError(
            "The wheel could not be built. It needs setuptools 77.0.3 or later (`pip install -U setuptools`). Its "
            f"output:\n{built.stderr.strip()[-2000:]}"
        )
    (wheel,) = target.glob("*.whl")
    return wheel


def _unpack(wheel: Path, folder: Path) -> list[str]:
    """Unpack the package next to the app, and return its requirements."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith(f"{PACKAGE}/")])
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        requirements = message_from_string(archive.read(metadata).decode()).get_all("Requires-Dist")
    return [requirement for requirement in requirements if "extra ==" not in requirement]
