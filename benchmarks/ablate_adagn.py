"""
Effect of adaptive group normalisation (AdaGN): the network of training/configs/emoji_32.yaml, trained with and without
it, on held-out images.

    python benchmarks/ablate_adagn.py [--seeds 0 1 2] [--output_dir outputs/adagn_ablation] [--json results.json]

The networks differ only in `resnet_time_scale_shift`: "scale_shift" is AdaGN, "default" adds the time embedding before
the second norm of a residual block, as in DDPM. Data, steps and seeds are those of the recipe
`training/configs/emoji_32.yaml`, and training runs the script itself. A folder that holds a finished run is not trained
again, however it was trained.

Reported for the EMA weights on the test images, with their classes: the hybrid loss (uniform t), and the bound in bits
per dimension over all timesteps. Both are sums over t; each image gets one random t from every stratum of timesteps, so
the estimate is unbiased, and all networks see the same images, timesteps and noise.
"""

import itertools
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from measuring import EMOJI, describe_machine, make_parser, write_report

from diffusers_adm import ADMPipeline
from diffusers_adm.training import ImageDataset, load_image_dataset, training_losses


REPOSITORY = Path(__file__).resolve().parent.parent
CONFIGS = REPOSITORY / "training" / "configs"
INJECTIONS = {"AdaGN": "scale_shift", "addition": "default"}
NUM_STRATA = 40


def train(folder: Path, injection: str, seed: int, arguments: list[str]) -> None:
    config = json.loads((CONFIGS / "unet_emoji_32.json").read_text()) | {"resnet_time_scale_shift": injection}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "unet.json").write_text(json.dumps(config))
    command = ["-m", "accelerate.commands.launch", "--config_file", CONFIGS / "accelerate_single_process.yaml"]
    command += ["--num_cpu_threads_per_process", torch.get_num_threads(), REPOSITORY / "training/train_adm.py"]
    command += ["--config", CONFIGS / "emoji_32.yaml", "--output_dir", folder.resolve(), "--seed", seed]
    command += ["--model_config_name_or_path", (folder / "unet.json").resolve(), *arguments]
    subprocess.run([sys.executable, *map(str, command)], check=True, cwd=REPOSITORY)


@torch.no_grad()
def evaluate(folder: Path) -> dict[str, float]:
    pipeline = ADMPipeline.from_pretrained(folder)
    unet, scheduler = pipeline.unet.eval(), pipeline.scheduler
    images, _ = load_image_dataset(data_files=str(REPOSITORY / EMOJI / "test.parquet"), label_column="label")
    dataset = ImageDataset(images, unet.config.sample_size, True, False)
    pixels = torch.stack([example["images"] for example in dataset])
    labels = torch.tensor(images["label"][:])
    num_timesteps = scheduler.config.num_train_timesteps
    # Strata of timesteps: single ones where most of the bound is, wide ones at the noisy end.
    edges = sorted({round(math.expm1(i / NUM_STRATA * math.log1p(num_timesteps))) for i in range(NUM_STRATA + 1)})
    generator = torch.Generator().manual_seed(0)
    bits, hybrid = scheduler.prior_bits_per_dim(pixels).double().mean().item(), 0.0
    for start, end in itertools.pairwise(edges):
        timesteps = torch.randint(start, end, (len(pixels),), generator=generator)
        noise = torch.randn(pixels.shape, generator=generator)
        noisy = scheduler.add_noise(pixels, noise, timesteps)
        output = unet(noisy, timesteps, class_labels=labels)
        # Both from one pass. The bound clips the predicted image, as sampling does; the loss does not.
        terms = training_losses(lambda *_, output=output: output, scheduler, pixels, timesteps, noise=noise)
        bound = scheduler.variational_bound(output.sample, pixels, noisy, timesteps)
        bits += (end - start) * bound.double().mean().item()
        hybrid += (end - start) / num_timesteps * terms.loss.double().mean().item()
    return {"hybrid": hybrid, "bits_per_dim": bits, "parameters": unet.num_parameters()}


def main() -> None:
    parser = make_parser(__doc__, "json")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/adagn_ablation"))
    args, training_arguments = parser.parse_known_args()

    results: dict[str, dict[int, dict[str, float]]] = {name: {} for name in INJECTIONS}
    for name, injection in INJECTIONS.items():
        for seed in args.seeds:
            folder = args.output_dir / f"{injection}-{seed}"
            if not (folder / "model_index.json").exists():
                train(folder, injection, seed, training_arguments)
            results[name][seed] = evaluate(folder)
            print(name, seed, results[name][seed], flush=True)

    print(f"\n{describe_machine()}\n\n| time embedding | parameters | held-out hybrid loss | bits/dim |")
    print("|---|---|---|---|")
    for name, by_seed in results.items():
        columns = [f"{by_seed[args.seeds[0]]['parameters'] / 1e6:.2f}M"]
        for key in ("hybrid", "bits_per_dim"):
            values = [figures[key] for figures in by_seed.values()]
            columns.append(f"{statistics.mean(values):.4f} ({', '.join(f'{value:.4f}' for value in values)})")
        print(f"| {name} | {' | '.join(columns)} |")
    write_report(args.json, args, **results)


if __name__ == "__main__":
    main()
