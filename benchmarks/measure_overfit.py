"""
Overfits a small model on a few 12-bit grey images, and measures how well its samples reproduce them.

    python benchmarks/measure_overfit.py --output_dir runs/overfit

The number of the image is the class, so that each can be asked for. Everything goes through the public commands:
16-bit PNG files, `train_adm.py`, `diffusers_adm.evaluation.sample`, and 16-bit PNG files again. Reported is the root
mean square error of each sample to its nearest training image, as a share of the range of the training images, and
which of these occur. The exit code is 1 if an error exceeds `--limit`, or if an image does not occur.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from measuring import describe_machine, make_parser, write_report
from PIL import Image


REPOSITORY = Path(__file__).resolve().parents[1]
# Thin where the images are large, wide where they are small: it has to remember whole images, at little cost.
NETWORK = {
    "_class_name": "AdaGNUNet2DModel",
    "sample_size": 32,
    "in_channels": 1,
    "out_channels": 2,  # mean and variance
    "block_out_channels": [16, 32, 96, 192, 192],
    "layers_per_block": 1,
    "down_block_types": ["ResnetDownsampleBlock2D"] * 5,
    "up_block_types": ["ResnetUpsampleBlock2D"] * 5,
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
    "attention_head_dim": 64,
    "attn_norm_num_groups": 8,
    "norm_num_groups": 8,
}


def run(*command: str) -> dict[str, float]:
    """Runs a command in the repository, and returns its time in seconds: elapsed, and of all processor cores."""

    def clocks() -> np.ndarray:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return np.array([time.perf_counter(), usage.ru_utime + usage.ru_stime])

    start = clocks()
    subprocess.run([sys.executable, *command], check=True, cwd=REPOSITORY, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    return dict(zip(("elapsed", "processor"), (clocks() - start).tolist(), strict=True))


def write_images(folder: Path, args: argparse.Namespace) -> np.ndarray:
    """
    The training images, `(num_images, height, width)`. Each is a class of its own, with several files, since a batch
    consists of different files.
    """
    made = folder / "made"
    run(
        "training/example_images.py", "--kind", "scans", "--num_images", str(args.num_images), "--output_dir", str(made)
    )
    paths = sorted(made.iterdir())
    for copy in range(args.batch_size // len(paths)):
        for path in paths:
            (folder / "data" / path.stem).mkdir(parents=True, exist_ok=True)
            (folder / "data" / path.stem / f"{copy:02}.png").write_bytes(path.read_bytes())
    return np.stack([read_image(path) for path in paths])


def read_image(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        if image.mode != "I;16":
            raise ValueError(f"{path} is an image of mode {image.mode}, not of 16-bit grey.")
        return np.array(image)


def main() -> int:
    parser = make_parser(
        __doc__,
        "output_dir",
        "json",
        num_images=4,
        batch_size=16,
        max_train_steps=800,
        learning_rate=2e-3,
        num_samples=8,
        num_inference_steps=250,
        limit=0.02,
        seed=0,
    )
    args = parser.parse_args()
    folder = args.output_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    images = write_images(folder, args).astype(np.float64)
    value_range = float(images.min()), float(images.max())
    (folder / "unet.json").write_text(json.dumps(NETWORK))

    training = run(
        "training/train_adm.py",
        *("--model_config_name_or_path", str(folder / "unet.json"), "--train_data_dir", str(folder / "data")),
        *("--label_column", "label", "--class_dropout_prob", "0"),
        *("--value_range", "auto", "--seed", str(args.seed)),
        *("--ddpm_beta_schedule", "cosine", "--prediction_type", "v_prediction"),
        *("--train_batch_size", str(args.batch_size), "--max_train_steps", str(args.max_train_steps)),
        *("--learning_rate", str(args.learning_rate), "--lr_scheduler", "cosine", "--lr_warmup_steps", "50"),
        *("--adam_beta2", "0.99", "--ema_max_decay", "0.98"),
        *("--num_validation_images", "4", "--validation_num_inference_steps", "25", "--report_to", "none"),
        *("--output_dir", str(folder / "model"), "--overwrite_output_dir"),
    )
    for path in (folder / "samples").glob("*"):
        path.unlink()  # of an earlier run
    sampling = run(
        *("-m", "diffusers_adm.evaluation.sample", "--model", str(folder / "model")),
        *("--num_images", str(args.num_samples), "--class_labels", "uniform", "--seed", str(args.seed)),
        *("--num_inference_steps", str(args.num_inference_steps)),
        *("--output_dir", str(folder / "samples")),
    )
    samples = np.stack([read_image(path) for path in sorted((folder / "samples").glob("*.png"))])
    differences = samples[:, None].astype(np.float64) - images
    errors = (differences**2).mean(axis=(2, 3)) ** 0.5 / (value_range[1] - value_range[0])
    nearest, found = errors.min(axis=1), np.bincount(errors.argmin(axis=1), minlength=len(images))
    passed = bool(nearest.max() <= args.limit and (found > 0).all())
    for number, (error, image) in enumerate(zip(nearest, errors.argmin(axis=1), strict=True)):
        print(f"sample {number}: nearest to image {image}, error {error:.2%} of the range")
    print(f"images {value_range[0]:g} to {value_range[1]:g}; samples {samples.min()} to {samples.max()}")
    print(f"largest error {nearest.max():.2%} (limit {args.limit:.0%}), mean {nearest.mean():.2%}")
    print(f"samples of each image: {', '.join(map(str, found))}")
    for name, seconds in (("training", training), ("sampling", sampling)):
        print(f"{name} {seconds['elapsed']:.0f} s ({seconds['processor']:.0f} s of processor time)")
    print(f"{describe_machine()}: {'ok' if passed else 'FAILED'}")
    write_report(
        args.json,
        args,
        errors=nearest.tolist(),
        samples_of_each_image=found.tolist(),
        seconds={"training": training, "sampling": sampling},
        passed=passed,
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
