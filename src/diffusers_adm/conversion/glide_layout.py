"""
Names and shapes of the tensors in GLIDE's checkpoints, which hold a U-Net and a text transformer.

The U-Net is guided-diffusion's with text added: its rules and its flags come from `openai_layout.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..models import GLIDETextModel
from .common import Flags, Shapes, TensorRule, fused_rules, kept, module_rules
from .openai_layout import channels_of_file, observed_flags


# Tensors of the text transformer.
TEXT_PREFIXES = ("transformer.", "transformer_proj.", "final_ln.", "unemb.")
TEXT_NAMES = ("token_embedding.weight", "positional_embedding", "padding_embedding")
# Input channels of a U-Net, as numbers of images and of masks: x_t, then the masked image and its mask for inpainting,
# then the upsampled low-resolution image.
INPUTS: dict[tuple[int, int], Flags] = {
    (1, 0): {"inpaint": False, "super_res": False},
    (2, 0): {"inpaint": False, "super_res": True},
    (2, 1): {"inpaint": True, "super_res": False},
    (3, 1): {"inpaint": True, "super_res": True},
}


def text_rules(model: GLIDETextModel) -> list[TensorRule]:
    """Lists the rules for all tensors of the text transformer `model`, which may be on the meta device."""
    return list(_walk(model))


def _walk(model: GLIDETextModel) -> Iterator[TensorRule]:
    yield kept("token_embedding.weight", "embeddings.token_embedding.weight")
    yield kept("positional_embedding", "embeddings.position_embedding")
    if model.config.use_padding_embedding:
        yield kept("padding_embedding", "embeddings.padding_embedding")
    for number in range(model.config.num_hidden_layers):
        source, target = f"transformer.resblocks.{number}", f"layers.{number}"
        yield from module_rules(f"{source}.ln_1", f"{target}.norm1")
        targets = [f"{target}.to_{part}" for part in "qkv"]
        heads = model.config.num_attention_heads
        yield from fused_rules(f"{source}.attn.c_qkv", targets, heads, heads_first=True, weight_dims=0)
        yield from module_rules(f"{source}.attn.c_proj", f"{target}.to_out")
        yield from module_rules(f"{source}.ln_2", f"{target}.norm2")
        yield from module_rules(f"{source}.mlp.c_fc", f"{target}.linear1")
        yield from module_rules(f"{source}.mlp.c_proj", f"{target}.linear2")
    if model.config.use_final_layer_norm:
        yield from module_rules("final_ln", "final_layer_norm")
    yield from module_rules("transformer_proj", "text_projection")


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
    r"""
    Reads the flags that names and shapes of the tensors reveal: those of the network except the attention heads.

    Raises:
        ValueError: If this is not a network of GLIDE's.
    """
    expected = {"token_embedding.weight": 2, "positional_embedding": 2, "transformer_proj.weight": 2}
    missing = [name for name, dims in expected.items() if len(shapes.get(name, ())) != dims]
    if missing:
        raise ValueError(
            f"This is not a checkpoint of GLIDE's: it lacks {', '.join(missing)}. It holds {len(shapes)} tensors: "
            f"{', '.join(list(shapes)[:4])} ... Convert networks without text with `python -m "
            "diffusers_adm.conversion.openai`."
        )
    unet = unet_shapes(shapes)
    # The code requires this size if there is a `channel_mult`, and its own levels follow the same rule.
    size = 2 ** (len(observed_flags(unet, "guided-diffusion", "unet")["channel_mult"].split(",")) + 2)
    channels, image_channels = shapes["input_blocks.0.0.weight"][1], image_channels_of(shapes)
    inputs = {images * image_channels + masks: kind for (images, masks), kind in INPUTS.items()}
    if channels not in inputs:
        raise ValueError(
            f"The U-Net takes {channels} channels; GLIDE's take {', '.join(map(str, inputs))} for images of "
            f"{image_channels} channels, half of the {2 * image_channels} that it returns."
        )
    flags = observed_flags(unet, "guided-diffusion", "unet", image_size=size)
    text_ctx, width = shapes["positional_embedding"]
    layers = {name.split(".")[2] for name in shapes if name.startswith("transformer.resblocks.")}
    network = ("num_channels", "num_res_blocks", "channel_mult", "use_scale_shift_norm", "resblock_updown")
    return {
        **{name: flags[name] for name in network},
        "image_size": size,
        "attention_resolutions": flags["attention_resolutions"],
        "text_ctx": text_ctx,
        "xf_width": width,
        "xf_layers": len(layers),
        "xf_final_ln": "final_ln.weight" in shapes,
        "xf_padding": "padding_embedding" in shapes,
        **inputs[channels],
    }
