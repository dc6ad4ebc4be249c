#!/usr/bin/env python
"""
`make demo`: teaches the demonstration model new images by name, and generates from the same noise before and after.

The model in spaces/model/latents generates 64x64 emoji in the style of Noto. It is fine-tuned by `accelerate launch
training/train_adm.py` with the recipe configs/emoji_64_twemoji.yaml on 24 Twemoji of familiar things, each with one
word. In addition to the loss curves of the training, this writes two images: a sample for each word, before and after,
above the image that it was to learn; and the denoising of one sample.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from datasets import load_dataset
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

from diffusers_adm import ADMPipeline
from diffusers_adm.commands.errors import CommandError, add_debug_argument, run_command
from diffusers_adm.conditioning.latents import LatentSpace
from diffusers_adm.training import labelled_grid


REPOSITORY = Path(__file__).resolve().parent.parent
DEFAULT_OUTPUT_DIR = Path("outputs/demo")
NEW_IMAGES = REPOSITORY / "data" / "twemoji-64" / "train.parquet"
COLUMNS = 8
STRIP_IMAGES = 10
STRIP_PROMPT = "panda"
SCALE = 2  # pixels of the figures for each pixel of an image
GAP = 24  # pixels between two rows of words


def train(output_dir: Path, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    command += ["--config_file", str(REPOSITORY / "training" / "configs" / "accelerate_single_process.yaml")]
    # By default, `accelerate launch` sets one thread per process, or as many as there are physical cores.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    command += ["--num_cpu_threads_per_process", str(cores)]
    command += [str(REPOSITORY / "training" / "train_adm.py"), "--config", "training/configs/emoji_64_twemoji.yaml"]
    # The recipe's paths are relative to the repository.
    done = subprocess.run([*command, "--output_dir", str(output_dir), *arguments], cwd=REPOSITORY)
    if done.returncode != 0:
        raise CommandError("The training has failed with the error above.", done.returncode)


def load(folder: Path, **kwargs) -> ADMPipeline:
    pipeline = ADMPipeline.from_pretrained(folder, **kwargs)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(desc="Sampling")
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def generate(pipeline: ADMPipeline, prompts: list[str], args: argparse.Namespace) -> list[Image.Image]:
    """One sample of each prompt, each with its own seed."""
    return pipeline(
        prompts,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(prompts))],
    ).images


def comparison(
    prompts: list[str], before: list[Image.Image], after: list[Image.Image], originals: list[Image.Image]
) -> Image.Image:
    """Below each prompt the sample before, the sample after, and the training image."""
    rows = {"before": before, "after": after, "to be learned": originals}
    grids = []
    for start in range(0, len(prompts), COLUMNS):
        block = slice(start, start + COLUMNS)
        images = [image for row in rows.values() for image in row[block]]
        grids.append(labelled_grid(images, len(rows), len(prompts[block]), list(rows), prompts[block], scale=SCALE))
    size = max(grid.width for grid in grids), sum(grid.height for grid in grids) + GAP * (len(grids) - 1)
    canvas, y = Image.new("RGB", size, "white"), 0
    for grid in grids:
        canvas.paste(grid, (0, y))
        y += grid.height + GAP
    return canvas


def denoising_strip(pipeline: ADMPipeline, num_inference_steps: int, **kwargs) -> dict[str, Image.Image]:
    """The sample at `STRIP_IMAGES` evenly spaced steps from noise to result, by label."""
    shown = [round(i * num_inference_steps / (STRIP_IMAGES - 1)) for i in range(STRIP_IMAGES)]
    config = pipeline.unet.config
    shape = (1, config.in_channels, config.sample_size, config.sample_size)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    frames = {0: latents.to(pipeline.device)}

    def keep(_, step: int, __, callback_kwargs: dict) -> dict:
        if step + 1 in shown:
            frames[step + 1] = callback_kwargs["latents"]
        return callback_kwargs

    pipeline(latents=latents, num_inference_steps=num_inference_steps, callback_on_step_end=keep, **kwargs)
    with torch.no_grad():
        samples = LatentSpace(pipeline.vae).decode(torch.cat(list(frames.values())))
    images = pipeline.image_processor.postprocess(samples, output_type="pil")
    return {f"step {step}": image for step, image in zip(frames, images, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=DEFAULT_OUTPUT_DIR)
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    add_debug_argument(parser)
    args, train_arguments = parser.parse_known_args()
    if args.debug:
        train_arguments.append("--debug")
    if not (REPOSITORY / "spaces" / "model").is_dir():
        raise CommandError("The demonstration needs a clone of the repository, with its folder spaces/model.")
    output_dir = args.output_dir.resolve()
    start = time.perf_counter()

    # Only the default folder is emptied, unless its run is resumed.
    if args.output_dir == DEFAULT_OUTPUT_DIR and not any("resume_from_checkpoint" in a for a in train_arguments):
        shutil.rmtree(output_dir, ignore_errors=True)
    lessons = load_dataset("parquet", data_files=str(NEW_IMAGES), split="train")
    prompts = list(lessons["text"])
    before = generate(load(REPOSITORY / "spaces" / "model" / "latents", variant="fp16"), prompts, args)
    train(output_dir, train_arguments)

    pipeline = load(output_dir)
    after = generate(pipeline, prompts, args)
    comparison(prompts, before, after, list(lessons["image"])).save(output_dir / "samples.png")

    strip = denoising_strip(
        pipeline,
        args.num_inference_steps,
        prompt=STRIP_PROMPT,
        guidance_scale=args.guidance_scale,
    )
    labelled_grid(list(strip.values()), 1, len(strip), [STRIP_PROMPT], list(strip), scale=SCALE).save(
        output_dir / "denoising.png"
    )

    print(f"\nDone in {time.perf_counter() - start:.0f} s. Look at:")
    for name, content in (
        ("samples.png", "a sample for each word before and after, from the same noise, and what was to be learned"),
        ("denoising.png", "one sample, from noise to image"),
        ("loss_curves.png", "loss, its terms, and by quarter of the timesteps"),
    ):
        print(f"  {os.path.relpath(output_dir / name)}  {content}")
    print(f'and load it yourself: ADMPipeline.from_pretrained("{os.path.relpath(output_dir)}")')


if __name__ == "__main__":
    run_command(main)
