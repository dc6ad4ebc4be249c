"""Loading of saved networks: whole, or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin


# What says by itself what is wrong.
CLEAR_ERRORS = (ValueError, TypeError, OSError, ImportError, torch.OutOfMemoryError)
MAX_NAMES = 5  # in a message


@contextlib.contextmanager
def explained(path: object, cls: type) -> Iterator[None]:
    """Turns errors that damaged files cause deep inside of the readers into a `ValueError` that names the files."""
    try:
        yield
    except CLEAR_ERRORS:
        raise
    except Exception as error:
        # The readers of JSON and safetensors, diffusers, torch and accelerate raise almost anything.
        raise ValueError(
            f"{path} cannot be loaded as {cls.__name__}. Its config or its weights may be damaged, or those of another "
            f"class. {type(error).__name__}: {error}"
        ) from error


class WholeModelMixin(ModelMixin):
    """A [`ModelMixin`] whose `from_pretrained` gives a network with all of its weights, or an error."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """
        Loads a saved network as diffusers does: from safetensors or, where there are none, from a pickle that is read
        with `weights_only=True`. But never without a part of its weights, where diffusers warns and leaves random
        numbers.

        Raises:
            ValueError: For missing weights, and for configs and files that are damaged or of another class.
            OSError: If there are no such files.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs["output_loading_info"] = True
        with explained(pretrained_model_name_or_path, cls):
            model, info = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        missing = sorted(info.get("missing_keys", ()))
        if missing:
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {len(missing)} of the weights of {cls.__name__}, such as "
                f"{', '.join(missing[:MAX_NAMES])}: they would be random. Its file is damaged, or its config that of "
                "another network. Download it again, or load it with the class in `_class_name` of its config."
            )
        return (model, info) if wants_info else model
