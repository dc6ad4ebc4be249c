"""The Hub: registration with diffusers, model cards, self-contained repositories, pushing, and the Space."""

import importlib
from typing import Any


_MODULES = {"export_model_file": "export", "push_folder": "push", "push_space": "space"}

__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
