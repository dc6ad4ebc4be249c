"""
The flags of GLIDE's code, the configs of networks and scheduler they mean, the published models, and the flags that the
tensors of a checkpoint reveal.

https://github.com/openai/glide-text2im (Nichol et al. 2021, https://huggingface.co/papers/2112.10741). Its U-Nets are
guided-diffusion's with text added to every attention layer, so `openai_flags.py` and `openai_layout.py` describe them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from ..models.config_checks import check_choice
from .common import IMAGE_CHANNELS, Flags, Shapes, named_flags, typed_flags
from .openai_flags import model_config, scheduler_config
from .openai_layout import channels_of_file, observed_flags


GLIDEKind = Literal["base", "base-inpaint", "upsample", "upsample-inpaint"]

CODE_BASE = "glide-text2im"
BASE_DEFAULTS: Flags = {
    "image_size": 64,
    "num_channels": 192,
    "num_res_blocks": 3,
    "channel_mult": "",
    "num_heads": 1,
    "num_head_channels": 64,
    "num_heads_upsample": -1,
    "attention_resolutions": "32,16,8",
    "dropout": 0.1,
    "text_ctx": 128,
    "xf_width": 512,
    "xf_layers": 16,
    "xf_heads": 8,
    "xf_final_ln": True,
    "xf_padding": True,
    "diffusion_steps": 1000,
    "noise_schedule": "squaredcos_cap_v2",
    "timestep_respacing": "",
    "use_scale_shift_norm": True,
    "resblock_updown": True,
    "use_fp16": True,
    "cache_text_emb": False,
    "inpaint": False,
    "super_res": False,
}
UPSAMPLER_DEFAULTS: Flags = {"image_size": 256, "num_res_blocks": 2, "noise_schedule": "linear", "super_res": True}
# Sizes that need no `channel_mult`; their levels are guided-diffusion's.
IMAGE_SIZES = (64, 128, 256)
# GLIDE's names of the noise schedules, and guided-diffusion's.
NOISE_SCHEDULES = {"linear": "linear", "squaredcos_cap_v2": "cosine"}
# Tensors of the text transformer.
TEXT_PREFIXES = ("transformer.", "transformer_proj.", "final_ln.", "unemb.")
TEXT_NAMES = ("token_embedding.weight", "positional_embedding", "padding_embedding")
# Flags of the U-Net that its tensors reveal.
UNET_FLAGS = ("num_channels", "num_res_blocks", "channel_mult", "use_scale_shift_norm", "resblock_updown")


class GLIDEPreset(NamedTuple):
    """A published checkpoint."""

    file: str
    kind: GLIDEKind
    num_parameters: int

    def url(self) -> str:
        return f"https://openaipublic.blob.core.windows.net/diffusion/dec-2021/{self.file}"

    def settle(self) -> Flags:
        """All flags of network and process: the defaults, and `inpaint`."""
        return default_flags(is_upsampler=self.kind.startswith("upsample")) | {"inpaint": self.kind.endswith("inpaint")}


GLIDE_PRESETS = {
    "base": GLIDEPreset("base.pt", "base", 385_030_726),
    "base-inpaint": GLIDEPreset("base_inpaint.pt", "base-inpaint", 385_037_638),
    "upsample": GLIDEPreset("upsample.pt", "upsample", 398_361_286),
    "upsample-inpaint": GLIDEPreset("upsample_inpaint.pt", "upsample-inpaint", 398_368_198),
}


def default_flags(is_upsampler: bool) -> Flags:
    """Flags that describe a network and its diffusion process, with their defaults."""
    return BASE_DEFAULTS | (UPSAMPLER_DEFAULTS if is_upsampler else {})


def parse_glide_flags(model_flags: str | Mapping[str, Any]) -> Flags:
    """Reads options of `create_model_and_diffusion`: `"--image_size 64 --xf_width 512"`, or names with values."""
    return typed_flags(named_flags(model_flags), BASE_DEFAULTS, CODE_BASE)


def kind_of(flags: Flags) -> GLIDEKind:
    """The kind of network that a full set of flags describes."""
    if flags["super_res"]:
        return "upsample-inpaint" if flags["inpaint"] else "upsample"
    return "base-inpaint" if flags["inpaint"] else "base"


def in_channels(flags: Flags, image_channels: int) -> int:
    """Input channels of the U-Net: x_t, the masked image and the keep mask, the upsampled low-resolution image."""
    inpaint = image_channels + 1 if flags["inpaint"] else 0
    return image_channels + inpaint + (image_channels if flags["super_res"] else 0)


def unet_config(flags: Flags, image_channels: int = IMAGE_CHANNELS) -> dict[str, Any]:
    """The config of `AdaGNUNet2DModel` that a full set of flags describes, for images of `image_channels`."""
    if flags["xf_width"] < 1:
        raise ValueError(
            f"`--xf_width` is {flags['xf_width']}: a network without text. Convert it with `python -m "
            "diffusers_adm.conversion.openai`."
        )
    if not flags["resblock_updown"]:
        raise ValueError(
            "`--resblock_updown` is False, but U-Nets with text in their attention layers resample in residual blocks."
        )
    if not flags["channel_mult"] and flags["image_size"] not in IMAGE_SIZES:  # guided-diffusion has more
        raise ValueError(
            f"`--image_size` is {flags['image_size']}; without `--channel_mult` (as in '1,2,3,4') it must be one of "
            f"{', '.join(map(str, IMAGE_SIZES))}."
        )
    config = model_config(
        flags | {"class_cond": False, "rescale_timesteps": False},
        "guided-diffusion",
        "unet",
        in_channels=in_channels(flags, image_channels),
        out_channels=2 * image_channels,
        num_classes=0,
    )
    for key in ("down_block_types", "up_block_types"):
        config[key] = tuple(name.replace("Attn", "SimpleCrossAttn") for name in config[key])
    return config | {
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "cross_attention_dim": flags["xf_width"],
        "addition_embed_type": "text_embeds",
    }


def text_config(flags: Flags, vocab_size: int) -> dict[str, Any]:
    """The config of `GLIDETextModel` that a full set of flags describes."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": flags["xf_width"],
        "num_hidden_layers": flags["xf_layers"],
        "num_attention_heads": flags["xf_heads"],
        "max_position_embeddings": flags["text_ctx"],
        "projection_dim": 4 * flags["num_channels"],
        "use_padding_embedding": flags["xf_padding"],
        "use_final_layer_norm": flags["xf_final_ln"],
    }


def glide_scheduler_config(flags: Flags) -> dict[str, Any]:
    """The config of `LearnedVarianceDDPMScheduler` for the diffusion process that a full set of flags describes."""
    check_choice("--noise_schedule", flags["noise_schedule"], NOISE_SCHEDULES)
    fixed = {"predict_xstart": False, "clip_denoised": True, "learn_sigma": True}
    schedule = NOISE_SCHEDULES[flags["noise_schedule"]]
    return scheduler_config(flags | fixed | {"noise_schedule": schedule})


def unet_shapes(shapes: Shapes) -> Shapes:
    """The tensors of the U-Net."""
    return {n: shape for n, shape in shapes.items() if not n.startswith(TEXT_PREFIXES) and n not in TEXT_NAMES}


def image_channels_of(shapes: Shapes) -> int:
    """Channels of the images: half of the output channels, since all of GLIDE's U-Nets learn the variance."""
    _, channels_out = channels_of_file(unet_shapes(shapes))
    if channels_out % 2:
        raise ValueError(
            f"The U-Net returns {channels_out} channels; GLIDE's return twice as many as an image has, for the learned "
            "variance."
        )
    return channels_out // 2


def observed_glide_flags(shapes: Shapes) -> Flags:
    """
    Reads the flags that names and shapes of the tensors reveal: those of the network except the attention heads. A
    `ValueError` if this is not a network of GLIDE's.
    """
    expected = {"token_embedding.weight": 2, "positional_embedding": 2, "transformer_proj.weight": 2}
    missing = [name for name, dims in expected.items() if len(shapes.get(name, ())) != dims]
    if missing:
        raise ValueError(
            f"This is not a checkpoint of GLIDE's: it lacks {', '.join(missing)}. It holds {len(shapes)} tensors: "
            f"{', '.join(list(shapes)[:4])} ... Convert networks without text with `python -m "
            "diffusers_adm.conversion.openai`."
        )
    unet, image_channels = unet_shapes(shapes), image_channels_of(shapes)
    # The code requires this size if there is a `channel_mult`, and its own levels follow the same rule.
    size = 2 ** (len(observed_flags(unet, "guided-diffusion", "unet")["channel_mult"].split(",")) + 2)
    flags = observed_flags(unet, "guided-diffusion", "unet", image_size=size)
    kinds = [{"inpaint": inpaint, "super_res": super_res} for super_res in (False, True) for inpaint in (False, True)]
    inputs = {in_channels(kind, image_channels): kind for kind in kinds}
    channels = shapes["input_blocks.0.0.weight"][1]
    if channels not in inputs:
        raise ValueError(
            f"The U-Net takes {channels} channels; GLIDE's take {', '.join(map(str, sorted(inputs)))} for images of "
            f"{image_channels} channels, half of the {2 * image_channels} that it returns."
        )
    text_ctx, width = shapes["positional_embedding"]
    return {
        **{name: flags[name] for name in UNET_FLAGS},
        "image_size": size,
        "attention_resolutions": flags["attention_resolutions"],
        "text_ctx": text_ctx,
        "xf_width": width,
        "xf_layers": len({name.split(".")[2] for name in shapes if name.startswith("transformer.resblocks.")}),
        "xf_final_ln": "final_ln.weight" in shapes,
        "xf_padding": "padding_embedding" in shapes,
        **inputs[channels],
    }
