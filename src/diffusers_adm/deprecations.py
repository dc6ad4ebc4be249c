"""Names of earlier versions, which warn and will be removed in 0.3."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any


PACKAGE = __name__.partition(".")[0]
REMOVED_IN = "0.3"

# New places of modules. A name of the old module is looked up in these, in this order.
MOVED_MODULES = {
    "command_line": ("commands.errors",),
    "conditions": ("conditioning.control_images",),
    "finiteness": ("ops.finiteness",),
    "guidance": ("conditioning.guidance",),
    "image_inputs": ("conditioning.image_inputs",),
    "inpainting": ("conditioning.inpainting",),
    "model_cards": ("hub.model_cards",),
    "noise_schedules": ("schedulers.noise_schedules",),
    "publishing": ("hub.publishing",),
    "registration": ("hub.registration",),
    "space": ("hub.space",),
    "super_resolution": ("conditioning.low_resolution",),
    "text_encoding": ("conditioning.text",),
    "training.captions": ("data.captions", "data.text_encoders", "conditioning.text"),
    "training.classification": (
        "training.metrics",
        "training.classifiers",
        "training.plots",
        "data.labels",
        "data.samplers",
    ),
    "training.conditioning": ("training.diffusion", "conditioning.class_labels", "conditioning.text"),
    "training.control": ("data.images",),
    "training.data": (
        "data.images",
        "data.columns",
        "data.checks",
        "data.decoding",
        "data.folders",
        "data.labels",
        "data.samplers",
        "data.sources",
    ),
    "training.fingerprints": ("data.fingerprints", "training.frozen"),
    "training.masks": ("data.masks",),
    "training.publication": ("hub.publication", "training.setup"),
    "training.repositories": ("data.repositories",),
    "training.seeding": ("data.seeding",),
    "training.steps": ("training.metrics", "training.run"),
}


# Old and new names, by module.
_RENAMED: dict[str, Mapping[str, str]] = {}


def renamed(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """
    Make the `__getattr__` of a module whose names have changed. It warns.

    Args:
        module (`str`): `__name__` of the module.
        names (mapping): From old to new names.
    """
    _RENAMED[module] = names

    def __getattr__(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        _warn(f"{module}.{name}", f"{module}.{names[name]}")
        return getattr(sys.modules[module], names[name])

    return __getattr__


def moved(module: str, targets: Mapping[str, str]) -> Callable[[str], Any]:
    """
    A module's `__getattr__` that finds what has gone to other modules of the package, and warns.

    Args:
        module (`str`): Its `__name__`.
        targets (mapping): From old names to new places below the package, such as `hub.publication.push_result`.
    """

    def __getattr__(name: str) -> Any:
        if name not in targets:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        place, _, new = targets[name].rpartition(".")
        _warn(f"{module}.{name}", f"{PACKAGE}.{targets[name]}")
        return getattr(importlib.import_module(f"{PACKAGE}.{place}"), new)

    return __getattr__


def _warn(old: str, new: str) -> None:
    warnings.warn(f"`{old}` is now `{new}`. The old name will be removed in {REMOVED_IN}.", FutureWarning, stacklevel=3)


class _MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of `MOVED_MODULES`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package == PACKAGE and name in MOVED_MODULES:
            return importlib.machinery.ModuleSpec(fullname, self)
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        places = MOVED_MODULES[module.__name__.partition(".")[2]]

        def __getattr__(name: str) -> Any:
            if not name.startswith("__"):
                for place in places:
                    target = importlib.import_module(f"{PACKAGE}.{place}")
                    new_name = _RENAMED.get(target.__name__, {}).get(name, name)
                    if hasattr(target, new_name):
                        _warn(f"{module.__name__}.{name}", f"{target.__name__}.{new_name}")
                        return getattr(target, new_name)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__getattr__ = __getattr__  # type: ignore[attr-defined]


def find_moved_modules() -> None:
    """Make old imports work. Called by `import diffusers_adm`; a second call changes nothing."""
    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(_MovedModules())
