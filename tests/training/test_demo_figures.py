"""The figures of `make demo`, with toy models, and its words."""

import numpy as np
import torch
from datasets import load_dataset
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from scripts import load_script
from tiny_autoencoders import random_vae
from toy_models import random_unet

from diffusers_adm import ADMPipeline


demo = load_script("demo")


def test_words():
    """Each once, and among them that of the strip."""
    words = load_dataset("parquet", data_files=str(demo.NEW_IMAGES), split="train")["text"]
    assert len(set(words)) == len(words) == 3 * demo.COLUMNS
    assert demo.STRIP_PROMPT in words


def test_before_above_after_above_the_image_to_learn():
    """In three rows of words, each with three rows of images; the last is not full."""
    colours = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255)}
    words = [f"word {i}" for i in range(2 * demo.COLUMNS + 1)]
    figure = np.array(demo.comparison(words, *([Image.new("RGB", (64, 64), name)] * len(words) for name in colours)))
    size = 64 * demo.SCALE
    found = {name: (figure == rgb).all(-1) for name, rgb in colours.items()}
    assert {name: pixels.sum() for name, pixels in found.items()} == dict.fromkeys(colours, len(words) * size**2)
    # From top to bottom in each column, again and again.
    first = figure[:, int(np.flatnonzero(found["red"].any(0))[0])]
    order = [name for pixel in first for name, rgb in colours.items() if (pixel == rgb).all()]
    assert order == [name for _ in range(3) for name in colours for _ in range(size)]


def test_strip_from_noise_to_the_sample():
    unet = random_unet(in_channels=4, out_channels=4)
    parts = dict.fromkeys(("text_encoder", "tokenizer", "classifier"))
    pipeline = ADMPipeline(unet, DPMSolverMultistepScheduler(), vae=random_vae(), **parts)
    pipeline.set_progress_bar_config(disable=True)
    steps = demo.STRIP_IMAGES - 1
    frames = demo.denoising_strip(pipeline, steps)
    assert list(frames) == [f"step {step}" for step in range(steps + 1)]
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    (sample,) = pipeline(latents=noise, num_inference_steps=steps).images
    assert np.abs(np.array(frames[f"step {steps}"], int) - np.array(sample, int)).max() <= 1
    assert frames["step 0"] != frames["step 1"]


def test_the_documentation_names_the_files():
    page = (demo.REPOSITORY / "docs" / "fine_tuning.md").read_text()
    assert all(f"{name}.png" in page for name in ("samples", "denoising"))
