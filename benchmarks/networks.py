"""Networks of several benchmarks: two U-Nets in the style of ADM, as ours and as diffusers'."""

import torch
from diffusers import UNet2DModel

from diffusers_adm import AdaGNUNet2DModel


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
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def build(which: str, network: str, dtype: str, memory_format: str, device: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = UNet2DModel(**NETWORKS[network])
    if which == "ours":
        theirs, model = model, AdaGNUNet2DModel(**NETWORKS[network])
        model.load_state_dict(theirs.state_dict())
    return model.to(device, DTYPES[dtype]).to(memory_format=FORMATS[memory_format])
