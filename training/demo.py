#!/usr/bin/env python
"""
`make demo`: fine-tunes the demonstration model to another style, and generates from the same noise before and after.

The model in spaces/model generates Noto emoji. It is trained by `accelerate launch training/train_adm.py` with the
recipe configs/emoji_32_twemoji.yaml on some 200 Twemoji. In addition to the loss curves of the training, this writes
two images: samples of both models by prompt, and the denoising of one sample.
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
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

from diffusers_adm import ADMPipeline
from diffusers_adm.commands.errors import CommandError, add_debug_argument, run_command
from diffusers_adm.training import labelled_grid


REPOSITORY = Path(__file__).resolve().parent.parent
DEFAULT_OUTPUT_DIR = Path("outputs/demo")
# Prompts and their categories. Only the first two are in the training data of the new style.
PROMPTS = {
    "red apple": "Food & Drink",
    "bus": "Travel & Places",
    "grinning face": "Smileys & Emotion",
    "red heart": "Smileys & Emotion",
    "dog face": "Animals & Nature",
    "france flag": "Flags",
}
SAMPLES_PER_PROMPT = 3
STRIP_IMAGES = 10
STRIP_PROMPT = "grinning face"


def train(output_dir: Path, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    command += ["--config_file", str(REPOSITORY / "training" / "configs" / "accelerate_single_process.yaml")]
    # By default, `accelerate launch` sets one thread per process, or as many as there are physical cores.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    command += ["--num_cpu_threads_per_process", str(cores)]
    command += [str(REPOSITORY / "training" / "train_adm.py"), "--config", "training/configs/emoji_32_twemoji.yaml"]
    # The recipe's paths are relative to the repository.
    done = subprocess.run([*command, "--output_dir", str(output_dir), *arguments], cwd=REPOSITORY)
    if done.returncode != 0:
        raise CommandError("The training has failed with the error above.", done.returncode)


def load(folder: Path, **kwargs) -> ADMPipeline:
    pipeline = ADMPipeline.from_pretrained(folder, **kwargs)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(desc="Sampling")
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def generate(pipeline: ADMPipeline, args: argparse.Namespace) -> list[Image.Image]:
    """`SAMPLES_PER_PROMPT` samples of each prompt, with the same seeds for each."""
    prompts = [prompt for prompt in PROMPTS for _ in range(SAMPLES_PER_PROMPT)]
    return pipeline(
        prompts,
        class_labels=[PROMPTS[prompt] for prompt in prompts],
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        generator=[torch.Generator().manual_seed(i % SAMPLES_PER_PROMPT) for i in range(len(prompts))],
    ).images


def denoising_strip(pipeline: ADMPipeline, num_inference_steps: int, **kwargs) -> dict[str, Image.Image]:
    """The sample at `STRIP_IMAGES` evenly spaced steps from noise to result, by label."""
    shown = [round(i * num_inference_steps / (STRIP_IMAGES - 1)) for i in range(STRIP_IMAGES)]
    size = pipeline.unet.config.sample_size
    latents = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(11))
    frames = {0: latents}

    def keep(_, step: int, __, callback_kwargs: dict) -> dict:
        if step + 1 in shown:
            frames[step + 1] = callback_kwargs["latents"].cpu()
        return callback_kwargs

    pipeline(latents=latents, num_inference_steps=num_inference_steps, callback_on_step_end=keep, **kwargs)
    images = pipeline.image_processor.postprocess(torch.cat(list(frames.values())), output_type="pil")
    return {f"step {step}": image for step, image in zip(frames, images, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=DEFAULT_OUTPUT_DIR)
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--guidance_scale", type=float, default=4.0)
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
    before = generate(load(REPOSITORY / "spaces" / "model" / "base", variant="fp16"), args)
    train(output_dir, train_arguments)

    pipeline = load(output_dir)
    after = generate(pipeline, args)
    scale = max(1, 64 // after[0].width)
    rows = [list(range(i, i + SAMPLES_PER_PROMPT)) for i in range(0, len(after), SAMPLES_PER_PROMPT)]
    images = [images[i] for row in rows for images in (before, after) for i in row]
    columns = [name for name in ("before", "after") for _ in range(SAMPLES_PER_PROMPT)]
    labelled_grid(images, len(rows), len(columns), list(PROMPTS), columns, scale=scale).save(output_dir / "samples.png")

    strip = denoising_strip(
        pipeline,
        args.num_inference_steps,
        prompt=STRIP_PROMPT,
        class_labels=PROMPTS[STRIP_PROMPT],
        guidance_scale=args.guidance_scale,
    )
    labelled_grid(list(strip.values()), 1, len(strip), [STRIP_PROMPT], list(strip), scale=scale).save(
        output_dir / "denoising.png"
    )

    print(f"\nDone in {time.perf_counter() - start:.0f} s. Look at:")
    for name, content in (
        ("samples.png", "samples from the same noise, before and after"),
        ("denoising.png", "one sample, from noise to image"),
        ("loss_curves.png", "loss, its terms, and by quarter of the timesteps"),
    ):
        print(f"  {os.path.relpath(output_dir / name)}  {content}")
    print(f'and load it yourself: ADMPipeline.from_pretrained("{os.path.relpath(output_dir)}")')


if __name__ == "__main__":
    run_command(main)
