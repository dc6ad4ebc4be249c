"""
Time of training and sampling 64x64 images in latents, relative to pixels: with the same U-Net at 64x64, and with a
32x32 model and an upsampler.

    python benchmarks/bench_latents.py [--device cuda] [--pairs 7] [--models spaces/model] [--json results.json]

The autoencoder (f = 4, four channels) and the U-Net are those of `training/configs/autoencoder_emoji_64.json` and
`training/configs/unet_emoji_64_latents.json`, with random weights; in pixels the U-Net has the same levels, depth and
width, and only its first and last convolution have other channels. Base model and upsampler are the demonstration
models, whose text encoder all of them use.

- `train`: losses, backward pass and optimizer step of a batch, in bfloat16 autocast; the latents are cached.
- `train-encoding`: the same, but the autoencoder encodes the images in each step.
- `sample`: one call of the pipelines for 4 images with prompts and `--steps` steps, decoding included, in float32.

Ratios are times ours (latents) / theirs (pixels); the limits are those of the speed-ups 6, 5 and 1.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from measuring import alternate, describe_machine, finish, make_parser, measure_rows, quiet, ratios

from diffusers_adm import AdaGNUNet2DModel, ADMPipeline, ADMSuperResolutionPipeline, LearnedVarianceDDPMScheduler
from diffusers_adm.conditioning.latents import LatentSpace
from diffusers_adm.training import training_losses


CONFIGS = Path(__file__).parents[1] / "training" / "configs"
SIZE = 64
NUM_CLASSES = 9
PROMPTS = ["fire", "red heart", "grinning face", "dog face"]
LIMITS = {("train", "64x64"): 1 / 6, ("sample", "64x64"): 1 / 5, ("sample", "32x32 + upsampler"): 1.0}


def build_unet(device: str, channels: int, size: int) -> AdaGNUNet2DModel:
    """The U-Net of the recipe with the input and output of these samples, with a learned variance."""
    config = json.loads((CONFIGS / "unet_emoji_64_latents.json").read_text())
    classes = {"num_class_embeds": NUM_CLASSES + 1, "null_class_id": NUM_CLASSES}
    config |= {"in_channels": channels, "out_channels": 2 * channels, "sample_size": size} | classes
    torch.manual_seed(0)
    return AdaGNUNet2DModel.from_config(config).to(device)


def build_vae(device: str) -> AutoencoderKL:
    torch.manual_seed(0)
    config = json.loads((CONFIGS / "autoencoder_emoji_64.json").read_text())
    return AutoencoderKL.from_config(config).requires_grad_(False).eval().to(device)


def train_row(args: argparse.Namespace, kind: str, peer: str) -> dict:
    encodes = kind == "train-encoding"
    latent_space = LatentSpace(build_vae(args.device))
    images = torch.randn(args.batch_size, 3, SIZE, SIZE, device=args.device).clamp(-1, 1)
    size = SIZE // latent_space.factor

    def trainer(unet: AdaGNUNet2DModel, get_samples: Callable[[], torch.Tensor]) -> Callable[[], None]:
        scheduler = LearnedVarianceDDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
        optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)
        n, device = args.batch_size, args.device
        kwargs = {
            "class_labels": torch.zeros(n, dtype=torch.long, device=device),
            "encoder_hidden_states": torch.randn(n, 24, unet.config.cross_attention_dim, device=device),
            "added_cond_kwargs": {"text_embeds": torch.randn(n, 256, device=device)},
        }
        timesteps = torch.randint(0, 1000, (n,), device=device)

        def run() -> None:
            samples = get_samples()
            with torch.autocast(device, torch.bfloat16):
                terms = training_losses(unet, scheduler, samples, timesteps, num_levels=None, model_kwargs=kwargs)
            terms.loss.mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    @torch.no_grad()
    def encode() -> torch.Tensor:
        return latent_space.encode(images)

    cached = encode()
    ours = trainer(build_unet(args.device, latent_space.channels, size), encode if encodes else lambda: cached)
    theirs = trainer(build_unet(args.device, 3, SIZE), lambda: images)
    row = ratios(alternate(ours, theirs, args.pairs, args.device))
    note = "images/s {:.1f} against {:.1f}  ".format(
        *(1000 * args.batch_size / row[f"{w}_ms"] for w in ("ours", "theirs"))
    )
    return _judged(row, kind, peer) | {"note": note}


def sample_row(args: argparse.Namespace, kind: str, peer: str) -> dict:
    base = quiet(ADMPipeline.from_pretrained(args.models / "base", variant="fp16").to(args.device))
    text = {"text_encoder": base.text_encoder, "tokenizer": base.tokenizer, "classifier": None}
    vae = build_vae(args.device)

    def pipeline(channels: int, size: int, vae: AutoencoderKL | None) -> ADMPipeline:
        unet = build_unet(args.device, channels, size).eval()
        return quiet(ADMPipeline(unet, LearnedVarianceDDPMScheduler(), vae, **text))

    options = {"num_inference_steps": args.steps, "generator": torch.Generator().manual_seed(0)}
    latents = pipeline(vae.config.latent_channels, SIZE // LatentSpace(vae).factor, vae)
    if peer == "64x64":
        pixels = pipeline(3, SIZE, None)

        def theirs() -> None:
            pixels(PROMPTS, **options)

    else:
        upsampler = quiet(ADMSuperResolutionPipeline.from_pretrained(args.models / "upsampler", variant="fp16"))
        upsampler.to(args.device)

        def theirs() -> None:
            small = base(PROMPTS, **options).images
            upsampler(image=small, **options)

    row = ratios(alternate(lambda: latents(PROMPTS, **options), theirs, args.pairs, args.device))
    return _judged(row, kind, peer)


def _judged(row: dict, kind: str, peer: str) -> dict:
    limit = LIMITS.get((kind, peer))
    return {**row, "limit": limit and round(limit, 4), "passed": None if limit is None else row["ratio"] <= limit}


def measure(args: argparse.Namespace, kind: str, peer: str) -> dict:
    return (sample_row if kind == "sample" else train_row)(args, kind, peer)


def main() -> int:
    settings = {"device": "cpu", "models": Path("spaces/model"), "batch_size": 16, "steps": 25, "pairs": 7}
    parser = make_parser(__doc__, "json", "threads", **settings)
    parser.add_argument("--only", nargs="*", default=[], help="Words that a row must all have, e.g. `sample 64x64`.")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    print(f"{describe_machine(args.device)}; latents / pixels, training batch {args.batch_size}, {args.steps} steps")
    cases = [("train", "64x64"), ("train-encoding", "64x64"), ("sample", "64x64"), ("sample", "32x32 + upsampler")]
    rows = measure_rows(("kind", "peer"), cases, measure, args)
    return finish(args, rows=rows)


if __name__ == "__main__":
    sys.exit(main())
