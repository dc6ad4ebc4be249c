"""Networks of several benchmarks: two U-Nets in the style of ADM, as ours and as diffusers', and their fastest rate."""

import functools
import importlib
import itertools
import sys
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from measuring import seconds

from diffusers_adm import AdaGNUNet2DModel
from diffusers_adm.conversion.openai_export import export_openai


ADM = {
    "in_channels": 3,
    "out_channels": 6,
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
    "attention_head_dim": 64,
    "attn_norm_num_groups": 32,
    "layers_per_block": 2,
}
NETWORKS = {
    "64x64": {
        **ADM,
        "sample_size": 64,
        "block_out_channels": (64, 128, 192, 256),
        "down_block_types": ("ResnetDownsampleBlock2D",) * 2 + ("AttnDownBlock2D",) * 2,
        "up_block_types": ("AttnUpBlock2D",) * 2 + ("ResnetUpsampleBlock2D",) * 2,
    },
    "32x32": {
        **ADM,
        "sample_size": 32,
        "block_out_channels": (128, 256, 256, 256),
        "down_block_types": ("ResnetDownsampleBlock2D", *("AttnDownBlock2D",) * 2, "ResnetDownsampleBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", *("AttnUpBlock2D",) * 2, "ResnetUpsampleBlock2D"),
    },
}
# Dtypes of the weights. "autocast": float32 weights, operations in bfloat16 where `torch.autocast` chooses it.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "autocast": torch.float32}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def build(which: str, network: str, dtype: str, memory_format: str, device: str) -> torch.nn.Module:
    """The network as "ours" or "theirs", with the same weights."""
    torch.manual_seed(0)
    model = UNet2DModel(**NETWORKS[network])
    if which == "ours":
        theirs, model = model, AdaGNUNet2DModel(**NETWORKS[network])
        model.load_state_dict(theirs.state_dict())
    # diffusers' own `to` warns at each cast that some modules should stay in float32; these networks have none.
    return torch.nn.Module.to(model, device, DTYPES[dtype]).to(memory_format=FORMATS[memory_format])


def make_inputs(
    network: str, dtype: str, memory_format: str, batch_size: int, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise `(batch_size, 3, size, size)` and timesteps `(batch_size,)`."""
    size = NETWORKS[network]["sample_size"]
    sample = torch.randn(batch_size, 3, size, size, generator=torch.Generator().manual_seed(1))
    sample = sample.to(device, DTYPES[dtype]).to(memory_format=FORMATS[memory_format])
    return sample, torch.arange(batch_size, device=device) * 100


def autocast(dtype: str, device: str) -> AbstractContextManager:
    return torch.autocast(device, torch.bfloat16, enabled=dtype == "autocast")


@functools.cache
def convolution_rate(dtype: str, device: str) -> float:
    """
    The best rate in FLOP/s over both layouts of the 3x3 convolutions that make up most of the networks. It is measured
    and printed at the first call.
    """
    best, computed = 0.0, torch.bfloat16 if dtype == "autocast" else DTYPES[dtype]
    for (channels, size), memory_format in itertools.product(((64, 64), (128, 64), (256, 32)), FORMATS.values()):
        x = torch.randn(4, channels, size, size, device=device, dtype=computed).to(memory_format=memory_format)
        weight = torch.randn(channels, channels, 3, 3, device=device, dtype=computed)
        weight = weight.to(memory_format=memory_format)
        times: list[float] = []
        # Fewer where one takes long, as in bfloat16 without instructions for it.
        while len(times) < 2 or (len(times) < 12 and sum(times) < 0.5):
            with torch.no_grad():
                times.append(seconds(lambda x=x, w=weight: F.conv2d(x, w, padding=1), device))
        best = max(best, 2 * x.numel() * channels * 9 / min(times[1:]))
    print(f"Best 3x3 convolution in {str(computed).removeprefix('torch.')}: {best / 1e9:.0f} GFLOP/s", flush=True)
    return best


def build_guided_diffusion(ours: AdaGNUNet2DModel, network: str, folder: Path) -> torch.nn.Module:
    """The network of the original code, from a checkout of openai/guided-diffusion, with our weights, in float32."""
    with tempfile.TemporaryDirectory() as temporary:
        export_openai(ours, Path(temporary) / "weights.pt", image_channels=3)
        weights = torch.load(Path(temporary) / "weights.pt", weights_only=True)
    sys.path.insert(0, str(folder))
    try:
        unet = importlib.import_module("guided_diffusion.unet")
    finally:
        sys.path.pop(0)
    model = unet.UNetModel(**guided_diffusion_arguments(NETWORKS[network]))
    model.load_state_dict(weights)
    return model


def guided_diffusion_arguments(config: dict) -> dict:
    """Arguments of guided-diffusion's `UNetModel` for a config of [`~networks.NETWORKS`]."""
    width = config["block_out_channels"][0]
    attends = ["Attn" in name for name in config["down_block_types"]]
    return {
        "image_size": config["sample_size"],
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": width,
        "channel_mult": tuple(channels // width for channels in config["block_out_channels"]),
        "num_res_blocks": config["layers_per_block"],
        "attention_resolutions": [2**level for level, attend in enumerate(attends) if attend],
        "num_head_channels": config["attention_head_dim"],
        "use_scale_shift_norm": True,
        "resblock_updown": True,
    }
