"""
Registration with diffusers, so that it loads the classes of this package: from the Hub as from a folder, through
`DiffusionPipeline` and `AutoModel` as through the classes themselves, and without `trust_remote_code`.

diffusers has no entry points for this. It finds a component by the pair `[library, class]` in `model_index.json`, where
the library must be a key of `LOADABLE_CLASSES`, and a pipeline or a single model by an attribute of `diffusers` itself.
These are private details of diffusers; tests/hub/test_registration.py fails when a release changes them.
"""

import os
import sys
import types
from typing import Any

import diffusers
from diffusers import ConfigMixin
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

from ..pipelines import ADMPipeline
from .export import export_class_file
from .model_cards import write_model_card
from .public_classes import COMPONENTS, PACKAGE, PUBLIC_CLASSES
from .publishing import add_publishing


# Base classes of components, and the methods that save and load them. diffusers looks these classes up as attributes of
# the package, so `diffusers_adm/__init__.py` re-exports them.
LOADABLE_BASES = {
    "ModelMixin": ["save_pretrained", "from_pretrained"],
    "SchedulerMixin": ["save_pretrained", "from_pretrained"],
}


def register_with_diffusers() -> None:
    """
    Enter the public classes where diffusers looks for them, and give them their methods for the Hub. Called by `import
    diffusers_adm`; a second call changes nothing.

    Raises:
        RuntimeError: If diffusers or another plugin already uses one of the names.
    """
    # In `diffusers`: pipelines by the `_class_name` of model_index.json, models by that of a single config.json. In
    # `diffusers.pipelines`: the modules of components. A repository that ships these as files names them as libraries,
    # and the installed module is used in place of the shipped file.
    entries = [(diffusers, cls.__name__, cls) for cls in PUBLIC_CLASSES]
    modules = [sys.modules[name] for name in dict.fromkeys(cls.__module__ for cls in COMPONENTS)]
    entries += [(diffusers.pipelines, module.__name__.rpartition(".")[2], module) for module in modules]
    for namespace, name, _ in entries:
        _check_free(namespace, name)
    if LOADABLE_CLASSES.get(PACKAGE, LOADABLE_BASES) != LOADABLE_BASES:
        raise RuntimeError(f"diffusers' `LOADABLE_CLASSES` already has another entry {PACKAGE!r}: another plugin's?")

    LOADABLE_CLASSES[PACKAGE] = LOADABLE_BASES
    for namespace, name, value in entries:
        setattr(namespace, name, value)
    for cls in PUBLIC_CLASSES:
        if issubclass(cls, ConfigMixin):  # `AdaGNMultiControlNetModel` is not: it saves its networks one by one
            add_publishing(cls, write_model_card, export_class_file)
    # From outside, so that `pipelines` needs no conversion, and code in repositories does not promise it.
    ADMPipeline.from_single_file = classmethod(_from_single_file)  # type: ignore[attr-defined]


def _from_single_file(cls: type[ADMPipeline], checkpoint: str | os.PathLike, **kwargs: Any) -> ADMPipeline:
    """
    Loads a checkpoint of guided-diffusion or improved-diffusion, converted in memory: see
    [`diffusers_adm.conversion.load_single_file`] for the arguments, such as `preset` or `model_flags`.
    """
    from ..conversion import load_single_file  # which most programs do not need

    return load_single_file(cls, os.fspath(checkpoint), **kwargs)


def _check_free(namespace: types.ModuleType, name: str) -> None:
    existing = getattr(namespace, name, None)
    if existing is None:
        return
    owner = existing.__name__ if isinstance(existing, types.ModuleType) else getattr(existing, "__module__", "")
    if owner.partition(".")[0] != PACKAGE:
        raise RuntimeError(
            f"`{namespace.__name__}.{name}` exists already and belongs to `{owner}`, so {PACKAGE} cannot register its "
            "own under this name. Import only one of the two, or install a version of diffusers that this version of "
            f"{PACKAGE} was tested with."
        )
