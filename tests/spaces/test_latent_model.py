"""The 64x64 demonstration model in latents: its autoencoder, its size, and the snapshots it comes from."""

import statistics
from pathlib import Path

import pytest
import torch

from diffusers_adm import ADMPipeline
from diffusers_adm.conditioning.image_format import ImageFormat
from diffusers_adm.conditioning.latents import LatentSpace
from diffusers_adm.data.columns import load_image_dataset
from diffusers_adm.data.images import ImageDataset
from diffusers_adm.training.image_measures import psnr


REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "spaces" / "model" / "latents"


@pytest.fixture(scope="module")
def pipe() -> ADMPipeline:
    pipe = ADMPipeline.from_pretrained(FOLDER, variant="fp16")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_size(pipe):
    assert sum(path.stat().st_size for path in (FOLDER / "vae").iterdir()) < 3e6
    assert pipe.unet.num_parameters() < 8e6
    assert LatentSpace(pipe.vae).factor == 4
    assert pipe.unet.config.out_channels == 2 * pipe.vae.config.latent_channels  # a learned variance


def test_reconstruction_of_held_out_emoji(pipe):
    """Above 27 dB, and with standard latents."""
    files = str(REPOSITORY / "data/noto-emoji-64/test.parquet")
    dataset = ImageDataset(load_image_dataset(data_files=[files])[0], 64, center_crop=True)
    images = torch.stack([dataset[index]["images"] for index in range(0, len(dataset), 2)])
    space = LatentSpace(pipe.vae)
    with torch.no_grad():
        samples = space.encode(images)
        decoded = space.decode(samples).clamp(-1, 1)
    values = (ImageFormat().to_values(x).numpy() for x in (decoded, images))
    assert statistics.mean(psnr(*pair, data_range=255) for pair in zip(*values, strict=True)) > 29
    # 82 images of other emoji than those that the scale was measured on.
    assert samples.mean(dim=(0, 2, 3)).tolist() == pytest.approx([0] * 4, abs=0.2)
    assert samples.std(dim=(0, 2, 3)).tolist() == pytest.approx([1] * 4, abs=0.2)


def test_generates_images_of_64_pixels(pipe):
    generator = torch.Generator().manual_seed(0)
    (image,) = pipe("fire", class_labels="Travel & Places", num_inference_steps=2, generator=generator).images
    assert image.size == (64, 64)
