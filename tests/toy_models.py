"""Real networks of toy size, filled with random numbers: as constructed they predict 0, and no test could fail."""

import torch
from diffusers import UNet2DModel

from diffusers_adm import AdaGNClassifierModel, AdaGNUNet2DModel


TOY_CONFIG = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "resnet_time_scale_shift": "scale_shift",
    "norm_num_groups": 4,
    "attn_norm_num_groups": 4,
    "attention_head_dim": 8,
}
CONDITIONAL = {"num_class_embeds": 5, "null_class_id": 4}
TOY_CLASSIFIER_CONFIG = {
    "sample_size": 8,
    "num_classes": 5,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}


def fill_randomly(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Outputs of about unit size that depend on every input."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.data = 0.1 * noise + ("norm" in name and name.endswith("weight"))
        elif "class_embedding" in name:
            parameter.data = noise
        else:
            parameter.data = noise / parameter[0].numel() ** 0.5
    return model.eval()


def random_unet(seed: int = 0, **config) -> AdaGNUNet2DModel:
    return fill_randomly(AdaGNUNet2DModel(**{**TOY_CONFIG, **config}), seed)


def random_classifier(seed: int = 0, **config) -> AdaGNClassifierModel:
    return fill_randomly(AdaGNClassifierModel(**{**TOY_CLASSIFIER_CONFIG, **config}), seed)


def random_diffusers_unet(seed: int = 0, **config) -> UNet2DModel:
    return fill_randomly(UNet2DModel(**{**TOY_CONFIG, **config}), seed)
