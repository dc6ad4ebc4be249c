"""Autoencoders of toy size with random weights, saved in a folder."""

import json
from pathlib import Path

from diffusers import AutoencoderKL, AutoencoderTiny, VQModel
from toy_models import fill_randomly

from diffusers_adm.conditioning.image_format import ImageFormat


# Of a posterior whose standard deviation matters, and samples of about unit size.
SCALING, SHIFT = 0.8, 0.1


def random_vae(seed=0, stages=2, **config):
    """An `AutoencoderKL` that downsamples by 2 for each stage but one."""
    defaults = {
        "down_block_types": ("DownEncoderBlock2D",) * stages,
        "up_block_types": ("UpDecoderBlock2D",) * stages,
        "block_out_channels": (4,) * stages,
        "norm_num_groups": 2,
        "latent_channels": 4,
        "layers_per_block": 1,
        "mid_block_add_attention": False,
        "scaling_factor": SCALING,
        "shift_factor": SHIFT,
    }
    return fill_randomly(AutoencoderKL(**defaults | config), seed)


def random_vq(seed=0, **config):
    defaults = {"block_out_channels": (4, 4), "norm_num_groups": 2, "latent_channels": 4, "num_vq_embeddings": 8}
    defaults |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return fill_randomly(VQModel(**defaults | config), seed)


def random_tiny(seed=0):
    widths = {"encoder_block_out_channels": (4, 4), "decoder_block_out_channels": (4, 4)}
    return fill_randomly(AutoencoderTiny(**widths, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)), seed)


def save_vae(folder, vae=None, image_format=None):
    """A folder as train_autoencoder.py leaves it."""
    (vae or random_vae()).save_pretrained(folder)
    if image_format is not None:
        record = {"image_format": image_format.to_config()}
        Path(folder, "autoencoder.json").write_text(json.dumps(record), encoding="utf-8")
    return str(folder)


RGB = ImageFormat()
