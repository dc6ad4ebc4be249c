"""
The common tests of diffusers' repository, from the checkout that the environment variable `DIFFUSERS_REPO` names.

They are not part of diffusers' package. The checkout gives the tests alone: what they test is the installed diffusers.
"""

import importlib
import os
import pathlib
import sys
import types

import pytest
import torch


# diffusers skips these without an accelerator, to save time; most of what they guard runs on a CPU as well.
ACCELERATOR_GATES = ("require_accelerator", "require_torch_accelerator", "require_torch_accelerator_with_training")


def load(name: str) -> types.ModuleType:
    """The module `tests.<name>` of the checkout; skips the calling test file where there is no checkout."""
    checkout = os.environ.get("DIFFUSERS_REPO")
    if not checkout:
        pytest.skip("DIFFUSERS_REPO names no checkout of diffusers (see docs/diffusers_contracts.md)", True)
    folder = pathlib.Path(checkout).resolve()
    if not (folder / "tests" / "testing_utils.py").is_file():
        raise FileNotFoundError(f"`DIFFUSERS_REPO` is {checkout!r}, which is no checkout of diffusers' repository.")
    sys.path.insert(0, str(folder))
    try:
        utils = importlib.import_module("tests.testing_utils")
        if utils.torch_device == "cpu":
            for gate in ACCELERATOR_GATES:
                setattr(utils, gate, lambda test: test)
        return importlib.import_module(f"tests.{name}")
    finally:
        sys.path.remove(str(folder))


def skip(*names: str, reason: str, only_without_accelerator: bool = False):
    """Class decorator: these inherited tests do not apply. A name that the class does not have is an error."""

    def decorate(cls: type) -> type:
        for name in names:
            if not hasattr(cls, name):
                raise AttributeError(f"{cls.__name__} has no test {name!r}: its skip is out of date.")
            if not (only_without_accelerator and torch.cuda.is_available()):
                setattr(cls, name, _skipped(reason))
        return cls

    return decorate


def _skipped(reason: str):
    @pytest.mark.skip(reason=reason)
    def test(self):
        pass

    return test
