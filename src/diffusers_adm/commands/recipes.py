"""
The recipes that are installed with the package, by name: those of the top-level folder `training/configs`, which is
installed as `diffusers_adm/scripts/configs`.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import did_you_mean


# Where recipes name files of the repository: the configs of networks, which are installed ...
CONFIGS = "training/configs/"
INSTALLED_CONFIGS = "diffusers_adm/scripts/configs/"  # in site-packages
# ... and what only a clone has.
FOLDERS_OF_CLONES = ("data/", "spaces/")
OF_ACCELERATE = "accelerate_"


def installed_configs() -> Path | None:
    """The folder of recipes; `None` if the scripts are not installed."""
    spec = importlib.util.find_spec(f"{__package__.partition('.')[0]}.scripts")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "configs"


def recipe_names() -> list[str]:
    """Names of the installed recipes, such as `emoji_32` and `openai/lsun_cat`."""
    folder = installed_configs()
    paths = [] if folder is None else [path.relative_to(folder) for path in folder.rglob("*.yaml")]
    return sorted(path.with_suffix("").as_posix() for path in paths if not path.name.startswith(OF_ACCELERATE))


def find_recipe(recipe: str) -> tuple[Path, bool]:
    """
    The file of a recipe, and whether it is an installed one. A path comes before a name.

    Raises:
        ValueError: If there is neither.
    """
    if os.path.isfile(recipe):
        return Path(recipe), False
    names = recipe_names()
    if recipe in names:
        return installed_configs() / f"{recipe}.yaml", True
    raise ValueError(
        f"`--config` is {recipe!r}, which is not a file. Pass the path of a YAML recipe, or the name of an installed "
        f"one, such as `emoji_32`.{did_you_mean(recipe, names)}"
    )


def locate(value: Any) -> Any:
    """
    A value of a recipe, with the paths of network configs that are not in the working directory but installed. Runs of
    earlier versions have recorded where the package was: if it is not there any more, its files are found by the end
    of their paths.
    """
    if isinstance(value, str) and value.startswith(CONFIGS):
        name = value.removeprefix(CONFIGS)
    elif is_of_installation(value):
        name = Path(value).as_posix().rpartition(f"/{INSTALLED_CONFIGS}")[2]
    else:
        return value
    folder = installed_configs()
    is_found = not os.path.exists(value) and folder is not None and (folder / name).is_file()
    return str(folder / name) if is_found else value


def is_of_installation(value: Any) -> bool:
    """Whether a value is the path of a network config in an installation of the package, of whichever environment."""
    return isinstance(value, str) and os.path.isabs(value) and f"/{INSTALLED_CONFIGS}" in Path(value).as_posix()


def portable(value: Any) -> Any:
    """
    A value as the record of a run holds it: an installed network config by the name that recipes give it, which
    [`locate`] finds wherever the environment is by then.
    """
    folder = installed_configs()
    if not isinstance(value, str) or folder is None or not Path(value).is_relative_to(folder):
        return value
    name = CONFIGS + Path(value).relative_to(folder).as_posix()
    return name if locate(name) == value else value  # not if the working directory holds another file of this name


def check_clone(recipe: str, values: Mapping[str, Any]) -> None:
    """
    Checks that what an installed recipe reads from a clone of the repository is in the working directory.

    Raises:
        ValueError: Naming what is missing.
    """
    for name, value in values.items():
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, str) and path.startswith(FOLDERS_OF_CLONES) and not os.path.exists(path):
                raise ValueError(
                    f"The recipe {recipe!r} sets `{name}` to {path!r}, which is a path in a clone of the repository. "
                    f"Run the command in the folder of a clone, or pass your own `--{name}` (`none` for none)."
                )


def find_accelerate_config(config: str | None) -> str | None:
    """The file that `--config_file` of Accelerate names: a path, or `accelerate_...` for an installed one."""
    folder = installed_configs()
    if config is not None and folder is not None and not os.path.exists(config) and config.startswith(OF_ACCELERATE):
        installed = folder / f"{config.removesuffix('.yaml')}.yaml"
        return str(installed) if installed.is_file() else config
    return config
