"""Writes networks as state dicts that OpenAI's code loads, the reverse of `convert_openai`."""

from __future__ import annotations

import functools
import json
import logging
import uuid
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ..data.repositories import check_can_be_written
from ..models import AdaGNClassifierModel, AdaGNUNet2DModel
from ..schedulers import LearnedVarianceDDPMScheduler
from .checkpoint_files import SAFETENSORS_DTYPES
from .common import IMAGE_CHANNELS, RECORD_NAME, Component, Flags, differences, expected_shapes
from .openai_checkpoints import NUM_CLASSES, build_network, check_channels_of_classifier
from .openai_flags import CHANNEL_MULT, Kind, default_flags, scheduler_config
from .openai_layout import describe_readings, image_channel_readings, tensor_rules


logger = logging.getLogger(__name__)

# The functions of guided-diffusion's script_util.py that build networks.
FACTORIES: dict[Kind, str] = {
    "unet": "create_model",
    "upsampler": "sr_create_model",
    "classifier": "create_classifier",
}
# Arguments that change what a network computes and not the shapes of its tensors; OpenAI's code has one value for each.
FIXED_ARGUMENTS = {
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "attn_norm_num_groups": 32,
    "norm_eps": 1e-5,
    "class_embed_type": None,
}


def export_openai(
    model: AdaGNUNet2DModel | AdaGNClassifierModel | str | Path,
    output_file: str | Path,
    *,
    new_attention_order: bool | None = None,
    scheduler: LearnedVarianceDDPMScheduler | None = None,
    image_channels: int | None = None,
) -> Flags:
    """
    Writes a network as a state dict that guided-diffusion loads (and improved-diffusion, if it has such a network).

    Args:
        model ([`AdaGNUNet2DModel`], [`AdaGNClassifierModel`], `str` or `Path`): The network, or a folder
            with it: of a pipeline, of a conversion or of the network only. The dtype in the folder is kept.
        output_file (`str` or `Path`): Must not exist.
        new_attention_order (`bool`, *optional*): Order of the rows of a `qkv`; `None`: that of the checkpoint which a
            folder was converted from, or else the older one (`--use_new_attention_order False`).
        scheduler ([`LearnedVarianceDDPMScheduler`], *optional*): Determines the returned flags of the diffusion
            process; `None`: that of the folder.
        image_channels (`int`, *optional*): Channels of the images that a U-Net denoises, if its numbers of channels
            have two meanings and no scheduler says whether half of its output is a variance.

    Returns:
        `dict`: The flags with which guided-diffusion's scripts build this network. The number of classes (1000), the
        channels of an image (3) and the absence of further input channels are constants in its code: a warning says how
        to change them.

    Raises:
        ValueError: If OpenAI's code cannot build this network, the channels have two meanings, or the file exists.
    """
    output_file = Path(output_file)
    if output_file.exists():
        raise ValueError(f"`output_file` {output_file} exists. Name another one, or remove it.")
    check_can_be_written("output_file", output_file.parent)
    record: dict[str, Any] = {}
    dtypes: dict[str, torch.dtype] = {}
    if isinstance(model, (str, Path)):
        folder = Path(model)
        if (folder / RECORD_NAME).is_file():
            record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
        if scheduler is None and (folder / "scheduler").is_dir():
            scheduler = LearnedVarianceDDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        model, dtypes = _load(folder)
    if new_attention_order is None:
        new_attention_order = record.get("flags", {}).get("use_new_attention_order", False)

    kind, learn_sigma = _kind_and_variance(model, scheduler, image_channels, record.get("kind"))
    flags = _flags_of(model, scheduler, kind, learn_sigma)
    flags |= {"use_new_attention_order": True} if new_attention_order else {}
    _check_expressible(model, kind, flags, scheduler)

    for note in _notes(model, scheduler, kind, learn_sigma):
        logger.warning(note)

    tensors = {name: tensor.to("cpu", dtypes.get(name)) for name, tensor in model.state_dict().items()}
    first_channels = 0
    if record.get("condition_first"):
        first_channels = model.config.in_channels - model.config.out_channels // (2 if learn_sigma else 1)
    state_dict = {
        rule.source: rule.join(*(tensors.pop(target) for target in rule.targets)).contiguous()
        for rule in tensor_rules(model, new_attention_order, first_channels)
    }
    output_file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output_file.with_name(f".{output_file.name}.{uuid.uuid4().hex[:8]}")
    try:
        torch.save(state_dict, unfinished)
        unfinished.replace(output_file)
    finally:
        unfinished.unlink(missing_ok=True)
    return flags


def _kind_and_variance(
    model: ModelMixin, scheduler: LearnedVarianceDDPMScheduler | None, image_channels: int | None, recorded: Kind | None
) -> tuple[Kind, bool]:
    """
    The kind of network that this is in OpenAI's code (`recorded`: that of the original checkpoint), and whether it
    predicts a variance; for a classifier, whether the process of its images has a learned variance.
    """
    config = model.config
    learned = None if scheduler is None else scheduler.has_learned_variance
    if isinstance(model, AdaGNClassifierModel):
        check_channels_of_classifier(config.in_channels, image_channels)
        return "classifier", bool(learned)

    channels_in, channels_out = config.in_channels, config.out_channels
    given = f"`model` has `in_channels` {channels_in} and `out_channels` {channels_out}"
    readings = image_channel_readings(channels_in, channels_out, "unet")
    if not readings:
        raise ValueError(
            f"{given}. A U-Net of guided-diffusion returns as many channels as its images have, or twice as many with "
            "a learned variance, and takes at least as many as they have."
        )
    known = readings
    if len(known) > 1 and learned is not None:
        known = image_channel_readings(channels_in, channels_out, "unet", learn_sigma=learned)
    if len(known) > 1 and image_channels is None and channels_in == channels_out:
        # The reading of its scripts: an upsampler of RGB images with a learned variance, or a U-Net without one.
        known = {channels_in == 2 * IMAGE_CHANNELS: readings[channels_in == 2 * IMAGE_CHANNELS]}
    meanings = describe_readings(channels_in, channels_out, "unet")
    if image_channels is not None:
        known = {variance: channels for variance, channels in known.items() if channels == image_channels}
        if not known:
            message = f"{given}, which means {meanings}. But `image_channels` is {image_channels}"
            if scheduler is not None:
                message += f", and the scheduler's `variance_type` is {scheduler.config.variance_type!r}"
            raise ValueError(f"{message}. Correct or omit `image_channels`.")
    if len(known) > 1:
        raise ValueError(
            f"{given}, which can mean {meanings}. Pass `scheduler`, the folder of the pipeline instead of that of the "
            "network, or `image_channels` (on the command line `--image_channels`)."
        )
    (learn_sigma,) = known
    if recorded in ("unet", "upsampler"):
        return recorded, learn_sigma
    has_small_image = channels_in == 2 * known[learn_sigma]
    is_known_size = config.sample_size in CHANNEL_MULT["guided-diffusion", "upsampler"]
    return "upsampler" if has_small_image and is_known_size else "unet", learn_sigma


def _notes(
    model: ModelMixin, scheduler: LearnedVarianceDDPMScheduler | None, kind: Kind, learn_sigma: bool
) -> list[str]:
    """Warnings about what flags cannot express: it must be changed in OpenAI's code, or at sampling."""
    config, notes = model.config, []
    is_classifier = kind == "classifier"
    classes = config.num_classes if is_classifier else config.num_class_embeds
    if classes not in (None, NUM_CLASSES):
        null = "" if config.get("null_class_id") is None else f"; label {config.null_class_id} means no class"
        notes.append(
            f"guided-diffusion has {NUM_CLASSES} classes. Change the numbers in its script_util.py to {classes}{null}."
        )
    factor = 2 if kind == "upsampler" else 1  # `SuperResModel` takes twice its `in_channels`
    is_usual = is_classifier or config.out_channels == IMAGE_CHANNELS * (2 if learn_sigma else 1)
    if not is_usual or config.in_channels != factor * IMAGE_CHANNELS:
        outputs = "" if is_classifier else f" and `out_channels` to {config.out_channels}"
        notes.append(
            f"guided-diffusion has images of {IMAGE_CHANNELS} channels and no conditions. Change `in_channels` in its "
            f"`{FACTORIES[kind]}` to {config.in_channels // factor}{outputs} (script_util.py)."
        )
        if kind == "upsampler" and config.in_channels % 2:
            notes[-1] += f" Its `SuperResModel` doubles `in_channels`; it must be {config.in_channels} (unet.py)."
    if scheduler is not None and not is_classifier and scheduler.has_learned_variance != learn_sigma:
        notes.append(
            f"The scheduler's `variance_type` is {scheduler.config.variance_type!r}, but the network predicts "
            f"{'a' if learn_sigma else 'no'} variance: the flags say `--learn_sigma {learn_sigma}`."
        )
    if scheduler is not None and scheduler.config.variance_type == "fixed_small":
        notes.append(
            "guided-diffusion's scripts sample with the larger fixed variance, this scheduler with the smaller one; "
            "improved-diffusion has `--sigma_small True` for it."
        )
    return notes


def _load(folder: Path) -> tuple[AdaGNUNet2DModel | AdaGNClassifierModel, dict[str, torch.dtype]]:
    """Loads the network of a folder, and the dtypes of its tensors: float16 and float32 may be mixed."""
    configs = [folder / name / "config.json" for name in ("unet", "classifier", ".")]
    found = [file.parent for file in configs if file.is_file()]
    if not found:
        raise ValueError(f"`model` is {str(folder)!r}, which holds neither `unet/`, `classifier/` nor a `config.json`.")
    folder = found[0]
    class_name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name")
    cls = AdaGNClassifierModel if class_name == AdaGNClassifierModel.__name__ else AdaGNUNet2DModel
    by_name = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}
    dtypes = {}
    # One file, or `...-00001-of-00002.safetensors` and so on; without variants.
    stem = SAFETENSORS_WEIGHTS_NAME.removesuffix(".safetensors")
    for file in (*folder.glob(SAFETENSORS_WEIGHTS_NAME), *folder.glob(f"{stem}-*-of-*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                dtypes |= {name: by_name[tensors.get_slice(name).get_dtype()] for name in tensors.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or cut short: {error}") from error
    # The widest dtype represents the others exactly.
    dtype = functools.reduce(torch.promote_types, dtypes.values(), torch.float16) if dtypes else torch.float32
    return cls.from_pretrained(folder, dtype=dtype), dtypes


def _flags_of(
    model: ModelMixin, scheduler: LearnedVarianceDDPMScheduler | None, kind: Kind, learn_sigma: bool
) -> Flags:
    """The flags that come closest to this network; `_check_expressible` says whether they describe it."""
    config = model.config
    size = config.sample_size
    if not isinstance(size, int):
        raise ValueError(f"`sample_size` of this network is {size}; OpenAI's code needs an integer: square images.")
    is_classifier = kind == "classifier"
    prefix = "classifier_" if is_classifier else ""

    width = config.time_proj_dim or config.block_out_channels[0]
    attending = [level for level, block in enumerate(model.down_blocks) if block.attentions[0] is not None]
    resolutions = ",".join(str(size // 2**level) for level in attending) or str(2 * size)
    first = model.down_blocks[0].downsamplers
    flags: Flags = {
        "large_size" if kind == "upsampler" else "image_size": size,
        "classifier_width" if is_classifier else "num_channels": width,
        "classifier_depth" if is_classifier else "num_res_blocks": config.layers_per_block,
        f"{prefix}attention_resolutions": resolutions,
        f"{prefix}use_scale_shift_norm": config.resnet_time_scale_shift == "scale_shift",
        f"{prefix}resblock_updown": first is not None and hasattr(first[0], "norm1"),
    }
    if is_classifier:
        flags["classifier_pool"] = config.pool
    else:
        heads = config.num_attention_heads
        if heads is None and config.attention_head_dim is not None:
            flags["num_head_channels"] = config.attention_head_dim
        else:
            flags["num_heads"] = heads if isinstance(heads, int) else 1 if heads is None else heads[-1]
            if config.num_attention_heads_up is not None:
                flags["num_heads_upsample"] = config.num_attention_heads_up
        flags |= {"class_cond": config.num_class_embeds is not None, "dropout": config.dropout}
        flags["learn_sigma"] = learn_sigma
    multiples = tuple(channels / width for channels in config.block_out_channels)
    if kind == "unet" and CHANNEL_MULT["guided-diffusion", kind].get(size) != multiples:
        flags["channel_mult"] = ",".join(f"{multiple:g}" for multiple in multiples)

    if scheduler is not None:
        process = scheduler.config
        flags["diffusion_steps"] = process.num_train_timesteps
        flags["noise_schedule"] = "cosine" if process.beta_schedule == "squaredcos_cap_v2" else "linear"
        flags["predict_xstart"] = process.prediction_type == "sample"
        if not process.clip_sample:
            flags["clip_denoised"] = False
        if is_classifier:
            flags["learn_sigma"] = learn_sigma
    if config.timestep_scale != 1.0:
        flags |= {"rescale_timesteps": True, "diffusion_steps": round(1000 / config.timestep_scale)}
    return flags


def _check_expressible(
    model: ModelMixin, kind: Kind, flags: Flags, scheduler: LearnedVarianceDDPMScheduler | None
) -> None:
    """Raises a `ValueError` unless guided-diffusion builds `model` and the process of `scheduler` from `flags`."""
    problems = []
    if kind != "unet" and flags.get("use_new_attention_order"):
        problems.append("its upsamplers and classifiers have only the older attention order (`new_attention_order`)")
    for name, value in FIXED_ARGUMENTS.items():
        own = model.config.get(name, value)
        if name == "attn_norm_num_groups" and own is None and model.config.resnet_time_scale_shift == "default":
            own = model.config.norm_num_groups
        if own != value and not (name == "act_fn" and own == "swish"):
            problems.append(f"`{name}` is {own!r}; it has only {value!r}")
    if getattr(model, "mid_block", None) is None or model.mid_block.attentions[0] is None:
        problems.append("the middle block has no attention, or is missing")
    if any(float(multiple) % 1 for multiple in flags.get("channel_mult", "1").split(",")):
        problems.append(
            f"`block_out_channels` are {flags['channel_mult']} x {flags['num_channels']}, not integer multiples"
        )

    if not problems:
        full = default_flags("guided-diffusion", kind) | flags
        shapes = expected_shapes(model, tensor_rules(model, False))
        try:
            twin = build_network(full, "guided-diffusion", kind, shapes)
        except ValueError as error:
            problems.append(str(error))
        else:
            problems += differences({kind: Component(twin, tensor_rules(twin, False))}, shapes)
            heads = [
                [m.heads for m in net.modules() if hasattr(m, "to_q") and hasattr(m, "heads")] for net in (model, twin)
            ]
            if heads[0] != heads[1]:
                problems.append(f"the numbers of attention heads {heads[0]} (in order) differ from level to level")
            if abs(twin.config.timestep_scale - model.config.timestep_scale) > 1e-12:
                problems.append(f"`timestep_scale` is {model.config.timestep_scale}; it has only 1 and 1000 / steps")
        if scheduler is not None and not problems:
            other = LearnedVarianceDDPMScheduler(**scheduler_config(full))
            if (
                other.config.num_train_timesteps != scheduler.config.num_train_timesteps
                or not torch.allclose(other.betas, scheduler.betas, rtol=1e-9, atol=0)
                or other.config.prediction_type != scheduler.config.prediction_type
            ):
                problems.append("it has no scheduler with these betas or this prediction type")
            if scheduler.config.variance_type == "learned_log":
                problems.append("the scheduler's `variance_type` is 'learned_log'; its variance channels differ")
    if problems:
        lines = "\n  ".join(problems)
        raise ValueError(f"guided-diffusion cannot build this network:\n  {lines}")
