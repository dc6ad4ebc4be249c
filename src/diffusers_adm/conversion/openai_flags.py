"""
The flags of guided-diffusion's and improved-diffusion's scripts, the configs of network and scheduler they mean, and
the published checkpoints.

https://github.com/openai/guided-diffusion (Dhariwal & Nichol 2021, https://huggingface.co/papers/2105.05233) and
https://github.com/openai/improved-diffusion (Nichol & Dhariwal 2021, https://huggingface.co/papers/2102.09672). Both
build the same kind of network; their defaults differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from ..models.config_checks import check_choice
from .common import Flags, named_flags, typed_flags


CodeBase = Literal["guided-diffusion", "improved-diffusion"]
Kind = Literal["unet", "upsampler", "classifier"]

PROCESS_DEFAULTS: Flags = {
    "clip_denoised": True,  # a flag of the sampling scripts
    "learn_sigma": False,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "timestep_respacing": "",
    "use_kl": False,
    "predict_xstart": False,
}
NETWORK_DEFAULTS: Flags = {
    "num_channels": 128,
    "num_res_blocks": 2,
    "num_heads": 4,
    "num_heads_upsample": -1,
    "attention_resolutions": "16,8",
    "dropout": 0.0,
    "class_cond": False,
    "use_checkpoint": False,
    "use_fp16": False,
    "use_scale_shift_norm": True,
}
# Added by guided-diffusion.
GUIDED_NETWORK_DEFAULTS: Flags = {"num_head_channels": -1, "resblock_updown": False}
UPSAMPLER_DEFAULTS: Flags = {"large_size": 256, "small_size": 64}
CLASSIFIER_DEFAULTS: Flags = {
    "image_size": 64,
    "classifier_use_fp16": False,
    "classifier_width": 128,
    "classifier_depth": 2,
    "classifier_attention_resolutions": "32,16,8",
    "classifier_use_scale_shift_norm": True,
    "classifier_resblock_updown": True,
    "classifier_pool": "attention",
}
# Channels of each level by image size, as multiples of `num_channels` (or `classifier_width`), if there is no
# `channel_mult`. A code base builds only the kinds of network that it has here.
_MULT_512, _MULT_256, _MULT_128 = (0.5, 1, 1, 2, 2, 4, 4), (1, 1, 2, 2, 4, 4), (1, 1, 2, 3, 4)
_MULT_64, _MULT_32 = (1, 2, 3, 4), (1, 2, 2, 2)
_GUIDED_MULT = {64: _MULT_64, 128: _MULT_128, 256: _MULT_256, 512: _MULT_512}
CHANNEL_MULT: dict[tuple[CodeBase, Kind], dict[int, tuple[float, ...]]] = {
    ("guided-diffusion", "unet"): _GUIDED_MULT,
    ("guided-diffusion", "classifier"): _GUIDED_MULT,
    # Also the upsampler to 512x512 has the levels of a 256x256 network.
    ("guided-diffusion", "upsampler"): {64: _MULT_64, 256: _MULT_256, 512: _MULT_256},
    ("improved-diffusion", "unet"): {32: _MULT_32, 64: _MULT_64, 256: _MULT_256},
    ("improved-diffusion", "upsampler"): {64: _MULT_64, 256: _MULT_256},
}
# A constant of guided-diffusion.
CLASSIFIER_HEAD_CHANNELS = 64
# Flags that describe a run and not the network: accepted and ignored, so that a whole command line can be pasted.
RUN_FLAGS = (
    *("anneal_lr", "base_samples", "batch_size", "classifier_path", "classifier_scale", "data_dir", "ema_rate"),
    *("eval_interval", "fp16_scale_growth", "iterations", "log_interval", "lr", "lr_anneal_steps", "microbatch"),
    *("model_path", "noised", "num_samples", "resume_checkpoint", "save_interval", "schedule_sampler", "use_ddim"),
    *("val_data_dir", "weight_decay"),
)


def default_flags(code_base: CodeBase, kind: Kind) -> Flags:
    """Flags that describe a network of this kind and its diffusion process, with their defaults."""
    guided = code_base == "guided-diffusion"
    process = PROCESS_DEFAULTS | {"rescale_timesteps": not guided, "rescale_learned_sigmas": not guided}
    if kind == "classifier":
        return CLASSIFIER_DEFAULTS | process
    flags = NETWORK_DEFAULTS | (GUIDED_NETWORK_DEFAULTS if guided else {}) | process
    if kind == "upsampler":
        return flags | UPSAMPLER_DEFAULTS
    flags |= {"image_size": 64}
    # The scripts do not pass these on to upsamplers.
    return flags | ({"channel_mult": "", "use_new_attention_order": False} if guided else {"sigma_small": False})


def size_flag(kind: Kind) -> str:
    """The flag of the size of generated or classified images."""
    return "large_size" if kind == "upsampler" else "image_size"


def possible_kinds(flags: Iterable[str], code_base: CodeBase) -> list[Kind]:
    """
    Kinds of network that have all these flags. The command line of `classifier_sample.py` has flags of a U-Net and of
    its classifier: these match both.
    """
    own = {kind: set(default_flags(code_base, kind)) for base, kind in CHANNEL_MULT if base == code_base}
    kinds = [kind for kind in own if own[kind].issuperset(flags)]
    if not kinds and own["unet"].union(own.get("classifier", ())).issuperset(flags):
        kinds = ["unet", "classifier"]
    if not kinds:
        of_upsamplers = [f"--{name}" for name in flags if name in UPSAMPLER_DEFAULTS]
        others = [f"--{name}" for name in flags if name not in own["upsampler"]]
        raise ValueError(
            f"`model_flags` describe more than one network: {', '.join(of_upsamplers)} belong to upsamplers, which do "
            f"not have {', '.join(others)}. A checkpoint holds one network: pass the flags of one."
        )
    return kinds


def parse_flags(model_flags: str | Mapping[str, Any], code_base: CodeBase) -> tuple[Flags, Kind | None, list[str]]:
    """
    Reads flags as the scripts do: `"--image_size 64 --class_cond True"` (or `--image_size=64`; words before the first
    flag are skipped), or a mapping from names to values.

    Returns:
        `tuple`: The flags that describe network and process; the kind of network if they determine it; and the names
        of flags that describe a run (`--batch_size`, `--model_path` ...), which are left out.
    """
    given = named_flags(model_flags)
    ignored = [name for name in given if name in RUN_FLAGS]
    defaults = (default_flags(code_base, kind) for base, kind in CHANNEL_MULT if base == code_base)
    known = {name: value for flags in defaults for name, value in flags.items()}
    given = typed_flags({name: given[name] for name in given if name not in ignored}, known, code_base)
    kinds = possible_kinds(given, code_base)
    return given, kinds[0] if len(kinds) == 1 else None, ignored


def channel_multiples(flags: Flags, code_base: CodeBase, kind: Kind) -> tuple[float, ...]:
    """Channels of each level, as multiples of `num_channels`."""
    if flags.get("channel_mult"):
        try:
            # The scripts accept only integers, but have one table that contains a half.
            return tuple(float(number) for number in flags["channel_mult"].split(","))
        except ValueError:
            raise ValueError(
                f"`--channel_mult` is {flags['channel_mult']!r}; it takes one number for each level, as in '1,2,3,4'."
            ) from None
    name, known = size_flag(kind), CHANNEL_MULT[code_base, kind]
    if flags[name] not in known:
        raise ValueError(
            f"`--{name}` is {flags[name]}, for which {code_base} has no channels per level; it has them for "
            f"{', '.join(map(str, known))}."
            + (" Pass `--channel_mult` (as in '1,2,3,4')." if "channel_mult" in flags else "")
        )
    return known[flags[name]]


def model_config(
    flags: Flags, code_base: CodeBase, kind: Kind, *, in_channels: int, out_channels: int, num_classes: int
) -> dict[str, Any]:
    """
    The config of `AdaGNUNet2DModel` or `AdaGNClassifierModel` that a full set of flags describes.

    Args:
        flags (`dict`): All of `default_flags(code_base, kind)`.
        in_channels, out_channels (`int`): Of the network; in the scripts 3 (6) and 3 or 6 (1000 for a classifier).
        num_classes (`int`): Rows of the class embedding, 1000 in the scripts. No effect without `class_cond`.
    """
    prefix = "classifier_" if kind == "classifier" else ""
    width = flags["classifier_width" if prefix else "num_channels"]
    size = flags[size_flag(kind)]
    channels = tuple(int(multiple * width) for multiple in channel_multiples(flags, code_base, kind))
    resolutions = flags[f"{prefix}attention_resolutions"]
    try:
        # Attention by downsampling factor, rounded as in the scripts.
        factors = {size // int(resolution) for resolution in resolutions.split(",")}
    except (ValueError, ZeroDivisionError):
        raise ValueError(
            f"`--{prefix}attention_resolutions` is {resolutions!r}; it takes sizes of feature maps, as in '32,16,8'."
        ) from None
    attends = [2**level in factors for level in range(len(channels))]
    residual = flags.get(f"{prefix}resblock_updown", False)

    config: dict[str, Any] = {
        "sample_size": size,
        "in_channels": in_channels,
        "block_out_channels": channels,
        "layers_per_block": flags["classifier_depth" if prefix else "num_res_blocks"],
        "down_block_types": _block_types("Down", attends, residual),
        "downsample_type": "resnet" if residual else "conv",
        "resnet_time_scale_shift": "scale_shift" if flags[f"{prefix}use_scale_shift_norm"] else "default",
    }
    if channels[0] != width:
        # The time embedding keeps the width of `num_channels` if the first level is narrower or wider.
        config |= {"time_proj_dim": width, "time_embedding_dim": 4 * width}
    if flags["rescale_timesteps"] and flags["diffusion_steps"] != 1000:
        config["timestep_scale"] = 1000.0 / flags["diffusion_steps"]

    head_dim: int | None = CLASSIFIER_HEAD_CHANNELS
    if kind == "classifier":
        config |= {"num_classes": out_channels, "pool": flags["classifier_pool"]}
    else:
        config |= {
            "out_channels": out_channels,
            "up_block_types": _block_types("Up", attends[::-1], residual),
            "upsample_type": config["downsample_type"],
            "dropout": flags["dropout"],
            "attn_norm_num_groups": 32,
            "num_class_embeds": num_classes if flags["class_cond"] else None,
        }
        head_dim = flags.get("num_head_channels", -1)
        if head_dim == -1:
            head_dim, config["num_attention_heads"] = None, flags["num_heads"]
            if flags["num_heads_upsample"] not in (-1, flags["num_heads"]):
                config["num_attention_heads_up"] = flags["num_heads_upsample"]
    config["attention_head_dim"] = head_dim
    attending = {channels[level] for level in range(len(channels)) if attends[level]} | {channels[-1]}
    if head_dim is not None and (head_dim < 1 or any(number % head_dim for number in attending)):
        raise ValueError(
            f"Heads of {head_dim} channels do not divide the levels with attention, which have {sorted(attending)}."
        )
    return config


def _block_types(direction: str, attends: list[bool], residual: bool) -> tuple[str, ...]:
    plain = f"Resnet{direction}sampleBlock2D" if residual else f"{direction}Block2D"
    return tuple(f"Attn{direction}Block2D" if attention else plain for attention in attends)


def scheduler_config(flags: Flags) -> dict[str, Any]:
    """The config of `LearnedVarianceDDPMScheduler` for the diffusion process that a full set of flags describes."""
    steps = flags["diffusion_steps"]
    if steps < 1:
        raise ValueError(f"`--diffusion_steps` is {steps}; it must be positive.")
    check_choice("--noise_schedule", flags["noise_schedule"], ("linear", "cosine"))
    config: dict[str, Any] = {
        "num_train_timesteps": steps,
        "prediction_type": "sample" if flags["predict_xstart"] else "epsilon",
        "clip_sample": flags["clip_denoised"],
        "variance_type": "learned_range",
    }
    if not flags["learn_sigma"]:
        config["variance_type"] = "fixed_small" if flags.get("sigma_small") else "fixed_large"
    if flags["noise_schedule"] == "cosine":
        config["beta_schedule"] = "squaredcos_cap_v2"
    else:
        # Both code bases stretch the schedule of 1000 steps, so that the last step has about the same noise.
        config |= {"beta_schedule": "linear", "beta_start": 1000 / steps * 0.0001, "beta_end": 1000 / steps * 0.02}
    return config


# The checkpoints that OpenAI has published, in March 2021 (improved-diffusion) and July 2021 (guided-diffusion).
# Names are those of the files without `.pt`; flags are from the READMEs of both repositories.


class Preset(NamedTuple):
    """Origin of a published checkpoint, and the flags that its network was built with."""

    code_base: CodeBase
    flags: str
    num_parameters: int

    def url(self, name: str) -> str:
        folder = "jul-2021" if self.code_base == "guided-diffusion" else "march-2021"
        return f"https://openaipublic.blob.core.windows.net/diffusion/{folder}/{name}.pt"

    def settle(self) -> tuple[Kind, Flags]:
        """The kind of network, and all flags of network and process."""
        given, kind, _ = parse_flags(self.flags, self.code_base)
        assert kind is not None  # every preset determines it
        return kind, default_flags(self.code_base, kind) | given


_ADM = "--learn_sigma True --resblock_updown True --use_scale_shift_norm True --diffusion_steps 1000"
_ADM_256 = f"{_ADM} --noise_schedule linear --attention_resolutions 32,16,8 --num_channels 256 --num_res_blocks 2"
_ADM_LSUN = f"{_ADM_256} --image_size 256 --class_cond False --num_head_channels 64"
_ADM_UPSAMPLER = f"{_ADM} --noise_schedule linear --class_cond True --num_channels 192 --num_res_blocks 2"
# The READMEs give no process for the classifiers; they see the noisy images of the network that they guide.
_CLASSIFIER = (
    "--classifier_attention_resolutions 32,16,8 --classifier_width 128 --classifier_pool attention"
    " --classifier_resblock_updown True --classifier_use_scale_shift_norm True"
    " --learn_sigma True --diffusion_steps 1000"
)
_IDDPM_64 = "--image_size 64 --num_channels 128 --num_res_blocks 3 --learn_sigma True"
_IDDPM_CIFAR = "--image_size 32 --num_channels 128 --num_res_blocks 3 --learn_sigma True --dropout 0.3"
_IDDPM_COSINE = "--diffusion_steps 4000 --noise_schedule cosine"
_IDDPM_LSUN = (
    "--image_size 256 --num_channels 128 --num_res_blocks 2 --num_heads 1 --learn_sigma True"
    " --use_scale_shift_norm False --attention_resolutions 16 --diffusion_steps 1000 --noise_schedule linear"
    " --rescale_learned_sigmas False --rescale_timesteps False"
)

PRESETS = {
    # guided-diffusion
    "64x64_diffusion": Preset(
        "guided-diffusion",
        f"{_ADM} --noise_schedule cosine --attention_resolutions 32,16,8 --image_size 64 --class_cond True"
        " --num_channels 192 --num_res_blocks 3 --num_head_channels 64 --use_new_attention_order True --dropout 0.1",
        295_904_454,
    ),
    "128x128_diffusion": Preset(
        "guided-diffusion", f"{_ADM_256} --image_size 128 --class_cond True --num_heads 4", 421_529_606
    ),
    "256x256_diffusion": Preset(
        "guided-diffusion", f"{_ADM_256} --image_size 256 --class_cond True --num_head_channels 64", 553_838_086
    ),
    "256x256_diffusion_uncond": Preset(
        "guided-diffusion", f"{_ADM_256} --image_size 256 --class_cond False --num_head_channels 64", 552_814_086
    ),
    "512x512_diffusion": Preset(
        "guided-diffusion", f"{_ADM_256} --image_size 512 --class_cond True --num_head_channels 64", 558_997_638
    ),
    "lsun_bedroom": Preset("guided-diffusion", f"{_ADM_LSUN} --dropout 0.1", 552_814_086),
    "lsun_cat": Preset("guided-diffusion", f"{_ADM_LSUN} --dropout 0.1", 552_814_086),
    "lsun_horse": Preset("guided-diffusion", f"{_ADM_LSUN} --dropout 0.1", 552_814_086),
    "lsun_horse_nodropout": Preset("guided-diffusion", f"{_ADM_LSUN} --dropout 0.0", 552_814_086),
    "64_256_upsampler": Preset(
        "guided-diffusion",
        f"{_ADM_UPSAMPLER} --attention_resolutions 32,16,8 --large_size 256 --small_size 64 --num_heads 4",
        311_795_910,
    ),
    "128_512_upsampler": Preset(
        "guided-diffusion",
        f"{_ADM_UPSAMPLER} --attention_resolutions 32,16 --large_size 512 --small_size 128 --num_head_channels 64",
        308_835_270,
    ),
    "64x64_classifier": Preset(
        "guided-diffusion", f"{_CLASSIFIER} --image_size 64 --classifier_depth 4 --noise_schedule cosine", 65_438_568
    ),
    "128x128_classifier": Preset(
        "guided-diffusion", f"{_CLASSIFIER} --image_size 128 --classifier_depth 2 --noise_schedule linear", 42_568_040
    ),
    "256x256_classifier": Preset(
        "guided-diffusion", f"{_CLASSIFIER} --image_size 256 --classifier_depth 2 --noise_schedule linear", 54_096_360
    ),
    "512x512_classifier": Preset(
        "guided-diffusion", f"{_CLASSIFIER} --image_size 512 --classifier_depth 2 --noise_schedule linear", 54_448_360
    ),
    # improved-diffusion
    "imagenet64_uncond_100M_1500K": Preset("improved-diffusion", f"{_IDDPM_64} {_IDDPM_COSINE}", 121_063_942),
    "imagenet64_uncond_vlb_100M_1500K": Preset(
        "improved-diffusion", f"{_IDDPM_64} {_IDDPM_COSINE} --use_kl True", 121_063_942
    ),
    "imagenet64_cond_270M_250K": Preset(
        "improved-diffusion",
        "--image_size 64 --num_channels 192 --num_res_blocks 3 --learn_sigma True --class_cond True"
        f" {_IDDPM_COSINE} --rescale_learned_sigmas False --rescale_timesteps False",
        273_049_350,
    ),
    "cifar10_uncond_50M_500K": Preset("improved-diffusion", f"{_IDDPM_CIFAR} {_IDDPM_COSINE}", 52_546_438),
    "cifar10_uncond_vlb_50M_500K": Preset(
        "improved-diffusion", f"{_IDDPM_CIFAR} {_IDDPM_COSINE} --use_kl True", 52_546_438
    ),
    "lsun_uncond_100M_1200K_bs128": Preset("improved-diffusion", _IDDPM_LSUN, 113_676_678),
    "lsun_uncond_100M_2400K_bs64": Preset("improved-diffusion", _IDDPM_LSUN, 113_676_678),
    "upsample_cond_500K": Preset(
        "improved-diffusion",
        "--large_size 256 --small_size 64 --num_channels 192 --num_res_blocks 2 --learn_sigma True --class_cond True"
        " --diffusion_steps 4000 --noise_schedule linear --rescale_learned_sigmas False --rescale_timesteps False",
        279_792_390,
    ),
}
