"""
`from_single_file` of pipelines: loads a checkpoint of OpenAI's code as `convert_openai` and `from_pretrained` would,
without writing the converted one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..commands.errors import did_you_mean
from ..pipelines import ADMPipeline
from .common import load_weights
from .glide_flags import GLIDE_PRESETS
from .openai_checkpoints import KIND_NAMES, read_openai
from .openai_flags import PRESETS, CodeBase


def load_single_file(
    cls: type[ADMPipeline],
    checkpoint: str | Path,
    *,
    preset: str | None = None,
    model_flags: str | Mapping[str, Any] | None = None,
    code_base: CodeBase | None = None,
    image_channels: int | None = None,
    key: str | None = None,
    condition_first: bool = False,
    torch_dtype: torch.dtype = torch.float32,
) -> ADMPipeline:
    r"""
    Loads a checkpoint of guided-diffusion or improved-diffusion (`"256x256_diffusion_uncond.pt"`), converted in memory.
    No code of the file is run. The result is that of `diffusers-adm convert openai` and `from_pretrained`.

    Args:
        cls (`type`): The class of the pipeline.
        checkpoint (`str` or `Path`): The `.pt` file on this machine. If it has the name of a published one, neither
            `preset` nor `model_flags` are needed.
        preset (`str`, *optional*), model_flags (`str` or mapping, *optional*), code_base (`str`, *optional*),
            image_channels (`int`, *optional*), key (`str`, *optional*), condition_first (`bool`): As for
            `diffusers_adm.conversion.convert_openai`: name of a published checkpoint, or the flags of the scripts that
            the network was trained with.
        torch_dtype (`torch.dtype`): Of the weights; float32 if it is not given.

    Returns:
        The pipeline, of the class that this was called on.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If there is neither `preset` nor `model_flags`, and the name is not that of a published checkpoint;
            if another class or a conversion must be used, e.g. for classifiers; as `convert_openai`.
    """
    checkpoint = Path(checkpoint)
    if preset is None and model_flags is None:
        preset = _published_name(checkpoint)
    read = read_openai(
        checkpoint,
        preset=preset,
        model_flags=model_flags,
        code_base=code_base,
        image_channels=image_channels,
        key=key,
        condition_first=condition_first,
    )
    if read.pipeline is None:
        raise ValueError(_without_pipeline(checkpoint, read.result.kind))
    needed = type(read.pipeline)
    # A class of the user counts as the class of this package that it is made of.
    own = next(base for base in cls.__mro__ if base.__module__.startswith(ADMPipeline.__module__.rpartition(".")[0]))
    if own is not needed:
        others = f" Then use `{cls.__name__}.from_pipe(pipe, ...)`." if needed is ADMPipeline else ""
        raise ValueError(
            f"{checkpoint} is {KIND_NAMES[read.result.kind]} for {needed.__name__}, not for {cls.__name__}. Use "
            f"`pipe = {needed.__name__}.from_single_file(...)`.{others}"
        )
    (component,) = read.components.values()
    load_weights(component, checkpoint, read.key, torch_dtype)
    return read.pipeline if cls is needed else cls.from_pipe(read.pipeline, torch_dtype=torch_dtype)


def _published_name(checkpoint: Path) -> str:
    """The name of the published checkpoint of this file name."""
    if checkpoint.stem in PRESETS:
        return checkpoint.stem
    if checkpoint.stem.replace("_", "-") in GLIDE_PRESETS:
        hint = " For GLIDE, which also needs a tokenizer, use `diffusers-adm convert glide` and `from_pretrained`."
    else:
        hint = did_you_mean(checkpoint.stem, PRESETS)
    raise ValueError(
        f"{checkpoint.name} is not the name of a published checkpoint, so its flags are not known. Pass `model_flags` "
        f'("--image_size 64 --num_channels 128 ..."), or as `preset` one of {", ".join(PRESETS)}.{hint}'
    )


def _without_pipeline(checkpoint: Path, kind: str) -> str:
    convert = f"`diffusers-adm convert openai --checkpoint {checkpoint} --output_dir FOLDER`"
    if kind == "classifier":
        return (
            f"{checkpoint} is a classifier, which no pipeline samples from. Convert it with {convert}, and pass "
            "`AdaGNClassifierModel.from_pretrained(FOLDER, subfolder='classifier')` as `classifier` to a pipeline."
        )
    return (
        f"No pipeline of this package takes the channels of {checkpoint}. Convert it with {convert}, and load "
        "`AdaGNUNet2DModel.from_pretrained(FOLDER, subfolder='unet')`."
    )
