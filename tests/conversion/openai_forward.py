"""
OpenAI's networks as plain functions of a state dict by OpenAI's names, in any dtype: what converted models are compared
with. Written down from the papers (Nichol & Dhariwal 2021, https://huggingface.co/papers/2102.09672, Dhariwal & Nichol
2021, https://huggingface.co/papers/2105.05233, and GLIDE, Nichol et al. 2021, https://huggingface.co/papers/2112.10741);
that names and shapes are OpenAI's, the stored layouts show.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class TextSpec:
    """GLIDE's transformer."""

    tokens: int = 31
    length: int = 6
    width: int = 24
    layers: int = 2
    heads: int = 3
    padding: bool = True
    final_norm: bool = True


@dataclass(frozen=True)
class Spec:
    """A network: channels of each level as multiples of `width`, attention at these downsampling factors."""

    width: int = 32
    multiples: tuple = (1, 2)
    layers: int = 1
    attention: frozenset = frozenset({2})
    in_channels: int = 3
    out_channels: int = 3  # or classes of a classifier
    heads: int = 4
    heads_up: int | None = None
    head_channels: int | None = None
    qkv_first: bool = False  # rows of a qkv ordered (qkv, head, channel), and not (head, qkv, channel)
    scale_shift: bool = True
    residual: bool = False  # resampling in residual blocks, and not by a convolution
    classes: int | None = None
    time_scale: float = 1.0
    pool: str | None = None  # of a classifier
    text: TextSpec | None = None


class Weights(dict):
    """A state dict that makes up, at random, what it is asked for and does not hold yet."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def take(self, name, *shape):
        if name not in self:
            noise = torch.randn(shape, generator=self.generator)
            if len(shape) > 1:
                self[name] = noise / math.prod(shape[1:]) ** 0.5
            else:  # biases, and the weights of norms
                self[name] = 0.3 * noise + name.endswith("weight")
        assert self[name].shape == shape, (name, self[name].shape, shape)
        return self[name]

    def double(self):
        twin = Weights()
        twin.update({name: tensor.double() for name, tensor in self.items()})
        return twin


def linear(weights, name, x, out):
    return F.linear(x, weights.take(f"{name}.weight", out, x.shape[-1]), weights.take(f"{name}.bias", out))


def conv(weights, name, x, out, kernel=3, stride=1):
    weight = weights.take(f"{name}.weight", out, x.shape[1], kernel, kernel)
    return F.conv2d(x, weight, weights.take(f"{name}.bias", out), stride=stride, padding=kernel // 2)


def conv_1d(weights, name, x, out):
    return F.conv1d(x, weights.take(f"{name}.weight", out, x.shape[1], 1), weights.take(f"{name}.bias", out))


def norm(weights, name, x):
    channels = x.shape[1]
    weight, bias = weights.take(f"{name}.weight", channels), weights.take(f"{name}.bias", channels)
    return F.group_norm(x, 32, weight, bias, eps=1e-5)


def sinusoid(t, width, dtype):
    # In float32 whatever the network's dtype: the originals have it so, and at t = 1000 it is 1e-4 from the exact one.
    t = t.float()
    frequencies = torch.exp(-math.log(10000) * torch.arange(width // 2, device=t.device).float() / (width // 2))
    angles = t[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1).to(dtype)


def attend(qkv, heads, qkv_first, text_kv=None):
    """(B, 3 C, N) -> (B, C, N); `text_kv`: keys and values of a text, (B, 2 C, L), in front of those of the image."""
    batch, channels, places = qkv.shape
    if qkv_first:
        query, key, value = qkv.reshape(batch, 3, heads, -1, places).unbind(1)
    else:
        query, key, value = qkv.reshape(batch, heads, 3, -1, places).unbind(2)
    if text_kv is not None:
        text_key, text_value = text_kv.reshape(batch, heads, 2, -1, text_kv.shape[2]).unbind(2)
        key, value = torch.cat([text_key, key], dim=3), torch.cat([text_value, value], dim=3)
    weight = torch.einsum("bhcq,bhck->bhqk", query, key) / query.shape[2] ** 0.5
    return torch.einsum("bhqk,bhck->bhcq", weight.softmax(dim=-1), value).reshape(batch, channels // 3, places)


def attention(weights, name, x, heads, spec, states=None):
    channels = x.shape[1]
    if spec.head_channels is not None:
        heads = channels // spec.head_channels
    qkv = conv_1d(weights, f"{name}.qkv", norm(weights, f"{name}.norm", x).flatten(2), 3 * channels)
    text_kv = None if states is None else conv_1d(weights, f"{name}.encoder_kv", states.mT, 2 * channels)
    answer = conv_1d(weights, f"{name}.proj_out", attend(qkv, heads, spec.qkv_first, text_kv), channels)
    return x + answer.reshape(x.shape)


def res_block(weights, name, x, emb, out, spec, resample=None):
    h = F.silu(norm(weights, f"{name}.in_layers.0", x))
    if resample == "up":
        h, x = (F.interpolate(tensor, scale_factor=2, mode="nearest") for tensor in (h, x))
    elif resample == "down":
        h, x = (F.avg_pool2d(tensor, 2) for tensor in (h, x))
    h = conv(weights, f"{name}.in_layers.2", h, out)
    change = linear(weights, f"{name}.emb_layers.1", F.silu(emb), out * (2 if spec.scale_shift else 1))[..., None, None]
    if spec.scale_shift:
        scale, shift = change.chunk(2, dim=1)
        h = norm(weights, f"{name}.out_layers.0", h) * (1 + scale) + shift
    else:
        h = norm(weights, f"{name}.out_layers.0", h + change)
    h = conv(weights, f"{name}.out_layers.3", F.silu(h), out)
    return h + (x if x.shape[1] == out else conv(weights, f"{name}.skip_connection", x, out, kernel=1))


def encode(weights, spec, x, t, y=None, states=None, pooled=None):
    """The time embedding, the skip connections, and the activations behind the middle block."""
    emb = linear(weights, "time_embed.0", sinusoid(t * spec.time_scale, spec.width, x.dtype), 4 * spec.width)
    emb = linear(weights, "time_embed.2", F.silu(emb), 4 * spec.width)
    if spec.classes is not None:
        emb = emb + weights.take("label_emb.weight", spec.classes, 4 * spec.width)[y]
    if pooled is not None:
        emb = emb + pooled

    h = conv(weights, "input_blocks.0.0", x, int(spec.multiples[0] * spec.width))
    skips = [h]
    for level, multiple in enumerate(spec.multiples):
        for _ in range(spec.layers):
            name = f"input_blocks.{len(skips)}"
            h = res_block(weights, f"{name}.0", h, emb, int(multiple * spec.width), spec)
            if 2**level in spec.attention:
                h = attention(weights, f"{name}.1", h, spec.heads, spec, states)
            skips.append(h)
        if level < len(spec.multiples) - 1:
            name = f"input_blocks.{len(skips)}.0"
            if spec.residual:
                h = res_block(weights, name, h, emb, h.shape[1], spec, resample="down")
            else:
                h = conv(weights, f"{name}.op", h, h.shape[1], stride=2)
            skips.append(h)

    h = res_block(weights, "middle_block.0", h, emb, h.shape[1], spec)
    h = attention(weights, "middle_block.1", h, spec.heads, spec, states)
    h = res_block(weights, "middle_block.2", h, emb, h.shape[1], spec)
    return emb, skips, h


def layer_norm(weights, name, x):
    width = x.shape[-1]
    return F.layer_norm(x, (width,), weights.take(f"{name}.weight", width), weights.take(f"{name}.bias", width))


def transformer(weights, text, tokens, mask, pooled_width):
    """(B, L) numbers and booleans -> states (B, L, C) and one vector a caption."""
    h = weights.take("token_embedding.weight", text.tokens, text.width)[tokens]
    h = h + weights.take("positional_embedding", text.length, text.width)
    if text.padding:
        h = torch.where(mask[..., None], h, weights.take("padding_embedding", text.length, text.width))
    for layer in range(text.layers):
        name = f"transformer.resblocks.{layer}"
        qkv = linear(weights, f"{name}.attn.c_qkv", layer_norm(weights, f"{name}.ln_1", h), 3 * text.width)
        h = h + linear(weights, f"{name}.attn.c_proj", attend(qkv.mT, text.heads, qkv_first=False).mT, text.width)
        hidden = linear(weights, f"{name}.mlp.c_fc", layer_norm(weights, f"{name}.ln_2", h), 4 * text.width)
        h = h + linear(weights, f"{name}.mlp.c_proj", F.gelu(hidden), text.width)
    if text.final_norm:
        h = layer_norm(weights, "final_ln", h)
    return h, linear(weights, "transformer_proj", h[:, -1], pooled_width)


def glide(weights, spec, x, t, tokens, mask):
    """What it inpaints and the enlarged small image come behind the noisy one, in `x`."""
    return unet(weights, spec, x, t, None, *transformer(weights, spec.text, tokens, mask, 4 * spec.width))


def unet(weights, spec, x, t, y=None, states=None, pooled=None):
    """(B, in_channels, H, W) -> (B, out_channels, H, W). An upsampler takes the enlarged image behind the noisy one."""
    emb, skips, h = encode(weights, spec, x, t, y, states, pooled)
    number = 0
    for level, multiple in reversed(list(enumerate(spec.multiples))):
        for index in range(spec.layers + 1):
            part, name = 1, f"output_blocks.{number}"
            h = res_block(weights, f"{name}.0", torch.cat([h, skips.pop()], 1), emb, int(multiple * spec.width), spec)
            if 2**level in spec.attention:
                heads = spec.heads if spec.heads_up is None else spec.heads_up
                h = attention(weights, f"{name}.1", h, heads, spec, states)
                part = 2
            if level > 0 and index == spec.layers:
                if spec.residual:
                    h = res_block(weights, f"{name}.{part}", h, emb, h.shape[1], spec, resample="up")
                else:
                    h = F.interpolate(h, scale_factor=2, mode="nearest")
                    h = conv(weights, f"{name}.{part}.conv", h, h.shape[1])
            number += 1
    return conv(weights, "out.2", F.silu(norm(weights, "out.0", h)), spec.out_channels)


def classifier(weights, spec, x, t):
    """(B, in_channels, H, W) -> logits (B, out_channels)"""
    _, skips, h = encode(weights, spec, x, t)
    channels = h.shape[1]
    if spec.pool == "adaptive":
        h = F.silu(norm(weights, "out.0", h)).mean(dim=(2, 3), keepdim=True)
        return conv(weights, "out.3", h, spec.out_channels, kernel=1).flatten(1)
    if spec.pool == "attention":
        h = F.silu(norm(weights, "out.0", h)).flatten(2)
        h = torch.cat([h.mean(dim=2, keepdim=True), h], dim=2)
        h = h + weights.take("out.2.positional_embedding", channels, h.shape[2])
        h = attend(conv_1d(weights, "out.2.qkv_proj", h, 3 * channels), channels // spec.head_channels, qkv_first=True)
        return conv_1d(weights, "out.2.c_proj", h, spec.out_channels)[:, :, 0]
    h = linear(weights, "out.0", torch.cat([feature.mean(dim=(2, 3)) for feature in (*skips, h)], dim=1), 2048)
    if spec.pool == "spatial":
        return linear(weights, "out.2", F.relu(h), spec.out_channels)
    return linear(weights, "out.3", F.silu(norm(weights, "out.1", h)), spec.out_channels)
