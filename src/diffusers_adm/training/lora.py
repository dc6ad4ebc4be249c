"""
Low-rank adapters (LoRA): training a few per cent of additional weights while the pretrained ones stay frozen.

Hu et al. 2021 (https://huggingface.co/papers/2106.09685): a weight W becomes W + (alpha / rank) B A, where A has `rank`
rows, B as many columns and starts at 0. PEFT keeps the adapter, diffusers saves it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import safe_open
from safetensors.torch import load_file

from ..commands.arguments import arg, check_at_least
from ..schedulers.noise_schedules import LORA_NOISE_SCHEDULE_KEY
from .arguments import NEVER, ModelArguments, TextArguments, check_needs, check_positive
from .checkpoints import unwrap


# diffusers' names in attention: queries, keys, values, output projection, and keys and values of added text.
ATTENTION_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")
WEIGHTS_NAME = "pytorch_lora_weights.safetensors"  # the name that `load_lora_weights` looks for in a folder
PREFIX = StableDiffusionLoraLoaderMixin.unet_name
# Checkpoints hold the trained adapter in this folder, and its average in their root, as the result does.
TRAINED_FOLDER = "trained_adapter"


@dataclass
class LoraArguments:
    """A low-rank adapter to train instead of the weights."""

    lora_rank: int | None = arg(None, "Rank of the adapter, e.g. 4 to 64; none: train the weights.", resume=NEVER)
    lora_alpha: float | None = arg(
        None, "The output of the adapter is scaled by `lora_alpha / lora_rank`; none: by 1.", resume=NEVER
    )
    lora_target_modules: list[str] | None = arg(
        None,
        "Layers to adapt, e.g. to_q to_v conv1 time_emb_proj; none: the projections of attention.",
        resume=NEVER,
    )

    def __post_init__(self):
        check_at_least(self, 1, "lora_rank")
        check_positive(self, "lora_alpha")
        check_needs(self, "lora_rank", "lora_alpha", "lora_target_modules")

    def check(self, model_args: ModelArguments, text_args: TextArguments) -> None:
        """Raises a `ValueError` if an adapter has no pretrained model, or an argument would modify it."""
        if self.lora_rank is None:
            return
        if model_args.pretrained_model_name_or_path is None:
            raise ValueError("`lora_rank` adapts a trained model. Name it with `--pretrained_model_name_or_path`.")
        for args, name in ((text_args, "train_text_encoder"), (model_args, "replace_classes")):
            if getattr(args, name):
                raise ValueError(f"`lora_rank` leaves all pretrained weights as they are. Drop `{name}`, or the rank.")


def train_lora(
    accelerator: Accelerator, unet: ModelMixin, lora_args: LoraArguments, noise_schedule: Mapping[str, Any]
) -> None:
    """Freezes `unet`, adds the adapter that the arguments describe, and keeps only it in checkpoints."""
    add_lora(unet, lora_args.lora_rank, lora_args.lora_alpha, lora_args.lora_target_modules)
    checkpoint_adapter_only(accelerator, noise_schedule)


def add_lora(unet: ModelMixin, rank: int, alpha: float | None = None, targets: Sequence[str] | None = None) -> None:
    """
    Freezes `unet`, a model with PEFT support, and adds an adapter to train.

    Args:
        rank (`int`): Rank of the adapter, at least 1.
        alpha (`float`, *optional*): The output of the adapter is multiplied by `alpha / rank`; None: by 1.
        targets (sequence of `str`, *optional*): Names of the layers to adapt, linear or convolutional, or their last
            parts, such as `conv1` or `time_emb_proj`. None: those of `ATTENTION_TARGETS` that exist.

    Raises:
        ValueError: If no layer has such a name.
    """
    from peft import LoraConfig

    layers = [name for name, module in unet.named_modules() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))]

    def is_there(target: str) -> bool:
        return any(name == target or name.endswith(f".{target}") for name in layers)

    missing = [target for target in targets or () if not is_there(target)]
    targets = [target for target in targets or ATTENTION_TARGETS if is_there(target)]
    if missing or not targets:
        known = sorted({name.rpartition(".")[2] for name in layers if not name.rpartition(".")[2].isdigit()})
        raise ValueError(
            f"The U-Net has no linear or convolutional layers {missing or 'of attention'} to adapt. "
            f"Choose `lora_target_modules` among {', '.join(known)}."
        )
    unet.add_adapter(  # which turns gradients off for all other weights
        LoraConfig(
            r=rank,
            lora_alpha=rank if alpha is None else alpha,
            init_lora_weights="gaussian",  # as diffusers' scripts do: A normal, B zero
            target_modules=targets,
        )
    )


def save_lora(unet: ModelMixin, folder: str | os.PathLike, noise_schedule: Mapping[str, Any] | None = None) -> None:
    """
    Writes the adapter of `unet` as `folder/pytorch_lora_weights.safetensors`, for `pipe.load_lora_weights(folder)` and
    `unet.load_lora_adapter(folder, prefix="unet", use_safetensors=True)`.

    Args:
        folder (`str` or `os.PathLike`): Made if it does not exist.
        noise_schedule (mapping, *optional*): The noise schedule of the training, from `noise_schedule_of`. It goes into
            the metadata: `load_lora_weights` of this package's pipelines compares it with that of their scheduler.
    """
    from peft.utils import get_peft_model_state_dict

    metadata = {f"{PREFIX}.{name}": value for name, value in _adapter_metadata(unet).items()}
    if noise_schedule is not None:
        metadata[LORA_NOISE_SCHEDULE_KEY] = dict(noise_schedule)
    # `save_lora_weights` calls it, too, but takes no further metadata.
    StableDiffusionLoraLoaderMixin.write_lora_layers(
        StableDiffusionLoraLoaderMixin.pack_weights(get_peft_model_state_dict(unet), PREFIX),
        save_directory=os.fspath(folder),
        is_main_process=True,
        weight_name=WEIGHTS_NAME,
        save_function=None,
        safe_serialization=True,
        lora_adapter_metadata=metadata,
    )


def load_lora(unet: ModelMixin, folder: str | os.PathLike) -> None:
    """
    Loads a file of `save_lora` into the adapter that `unet` has. Raises a `ValueError` for another configuration or
    other layers: layers that the file lacks would keep their random initial weights.
    """
    from peft import set_peft_model_state_dict

    path = os.path.join(folder, WEIGHTS_NAME)
    if not os.path.isfile(path):
        raise ValueError(
            f"The checkpoint {folder} holds no adapter ({WEIGHTS_NAME}): it was written by a run without "
            "`lora_rank`. Resume it without, or start a new run."
        )
    with safe_open(path, "pt") as file:
        saved = json.loads(file.metadata()[LORA_ADAPTER_METADATA_KEY])
    current = _adapter_metadata(unet)
    for argument, key in (("lora_rank", "r"), ("lora_alpha", "lora_alpha"), ("lora_target_modules", "target_modules")):
        before = saved[f"{PREFIX}.{key}"]
        if before != current[key]:
            raise ValueError(
                f"The adapter of {folder} was started with `{argument}` {before}, and this run has {current[key]}. "
                "Resume with the former, or start a new run."
            )
    state = {name.removeprefix(f"{PREFIX}."): value for name, value in load_file(path).items()}
    result = set_peft_model_state_dict(unet, state)
    # All weights of the frozen U-Net are missing keys.
    differing = [*result.unexpected_keys, *(name for name in result.missing_keys if ".lora_" in name)]
    if differing:
        raise ValueError(
            f"The adapter of {folder} has other layers than that of this run, such as {differing[0]}. Resume with the "
            "`pretrained_model_name_or_path` that it was started with."
        )


def _adapter_metadata(unet: ModelMixin) -> dict[str, Any]:
    """The configuration of the adapter as JSON can hold it."""
    config = unet.peft_config["default"].to_dict()
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}


def checkpoint_adapter_only(accelerator: Accelerator, noise_schedule: Mapping[str, Any] | None = None) -> None:
    """
    Makes `accelerator.save_state` and `load_state` write and read the adapter of the U-Net instead of all its weights;
    `noise_schedule` as for `save_lora`.
    """

    def save(models: list[torch.nn.Module], weights: list, folder: str) -> None:
        weights.clear()  # or Accelerate would write them
        if accelerator.is_main_process:
            for model in models:
                save_lora(unwrap(accelerator, model), os.path.join(folder, TRAINED_FOLDER), noise_schedule)

    def load(models: list[torch.nn.Module], folder: str) -> None:
        trained = os.path.join(folder, TRAINED_FOLDER)
        while models:  # Accelerate would read those that are left
            # Checkpoints of the first version have the trained adapter in their root, and no average.
            load_lora(unwrap(accelerator, models.pop()), trained if os.path.isdir(trained) else folder)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
