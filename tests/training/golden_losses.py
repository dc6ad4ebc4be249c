#!/usr/bin/env python
"""
The losses of the first 30 steps of every training script, for tiny networks on embedded data: in float32, on the CPU,
in one process. `test_golden_losses.py` compares them with golden_losses.json. After a change that is meant to change
them, write that file anew, and say in the commit what changed and why:

    python tests/training/golden_losses.py [--output FILE] [--jitter SEED] [SCRIPT ...]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from unittest import mock  # noqa: E402

from jitter import Jitter  # noqa: E402
from runs import EMOJI, SPEED, flags, read_metrics, reset_accelerate, save_base  # noqa: E402
from scripts import REPOSITORY, load_script  # noqa: E402
from toy_clips import TOY_CLIP_CONFIG, save_clip  # noqa: E402
from toy_embeddings import save_embeddings, write_emoji_captions  # noqa: E402
from toy_models import TOY_AUTOENCODER_CONFIG, TOY_CLASSIFIER_CONFIG, TOY_CONFIG, random_unet  # noqa: E402


PATH = Path(__file__).with_name("golden_losses.json")
SCRIPTS = (
    "train_adm",
    "train_autoencoder",
    "train_classifier",
    "train_clip",
    "train_controlnet",
    "train_image_to_image",
    "train_prior",
    "train_super_resolution",
)
NUM_STEPS = 30
RUN = {
    "data_files": EMOJI,
    "label_column": "label",
    "max_train_samples": 64,
    "max_train_steps": NUM_STEPS,
    "train_batch_size": 4,
    "learning_rate": 2e-3,
    "lr_warmup_steps": 5,
    # Where a gradient is 0 but for its last bits, Adam with its usual epsilon steps either way, and other kernels would
    # give another run.
    "adam_epsilon": 1e-3,
    "logging_steps": 1,
    "report_to": "none",
    "seed": 1,
}
MEASURES = ("loss", "mse", "vb", "reconstruction", "kl", "adaptive_weight", "discriminator_loss", "logit_scale")
SAMPLES = {"num_validation_images": 1, "validation_num_inference_steps": 1}


def arguments_of(script: str, folder: Path) -> dict:
    """The arguments of the run of a script; it writes into the folder."""

    def config(content: dict, **changes: object) -> dict[str, str]:
        path = folder / "config.json"
        path.write_text(json.dumps({**content, **changes}), encoding="utf-8")
        return {"model_config_name_or_path": str(path)}

    run = RUN | {"output_dir": str(folder / script)}
    if script == "train_adm":
        return run | SAMPLES | config(TOY_CONFIG, dropout=0.1) | {"random_flip": True, "snr_gamma": 5.0}
    if script == "train_autoencoder":
        losses = {"kl_weight": 0.1, "discriminator_start": 10, "discriminator_channels": 8, "discriminator_layers": 1}
        return run | {"num_validation_images": 1} | config(TOY_AUTOENCODER_CONFIG, sample_size=16) | losses
    if script == "train_classifier":
        return run | config({k: v for k, v in TOY_CLASSIFIER_CONFIG.items() if k != "num_classes"})
    if script == "train_clip":
        words = {"tokenizer_name_or_path": str(REPOSITORY / "spaces" / "model" / "base"), "caption_column": "text"}
        return {k: v for k, v in run.items() if k != "label_column"} | config(TOY_CLIP_CONFIG) | words
    if script == "train_controlnet":
        base = save_base(folder / "base", random_unet(num_class_embeds=10, null_class_id=9))
        return run | SAMPLES | {"pretrained_model_name_or_path": base, "condition": "low_resolution"}
    if script == "train_image_to_image":
        return run | SAMPLES | config(TOY_CONFIG, in_channels=6) | {"source": "low_resolution", "objective": "vlb"}
    if script == "train_prior":
        data = write_emoji_captions(folder / "emoji.parquet", EMOJI, 64)
        clip = save_clip(folder / "clip")
        embeddings = save_embeddings(folder / "embeddings", clip, data, random_flip=True)
        network = config({"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1})
        data = {"clip": clip, "train_data_dir": str(embeddings), "caption_column": "captions"}
        return {k: v for k, v in run.items() if k not in ("data_files", "label_column")} | network | data
    sizes = {"low_res_size": 4, "max_noise_level": 20}
    return run | SAMPLES | config(TOY_CONFIG, in_channels=6, time_cond_proj_dim=8) | sizes


@contextlib.contextmanager
def without_plots(module: object) -> Iterator[None]:
    """Plots take longer than the run."""
    with contextlib.ExitStack() as stack:
        for place in (sys.modules["diffusers_adm.training.run"], module):
            for name in ("plot_loss_curves", "plot_classifier_curves"):
                if hasattr(place, name):
                    stack.enter_context(mock.patch.object(place, name))
        yield


def losses_of(script: str, folder: Path) -> dict[str, list[float | None]]:
    """Each measure of the rows of a run: one value a step, None where the row has none."""
    module = load_script(script)
    reset_accelerate()
    with without_plots(module):
        module.main(flags(**arguments_of(script, folder)))
    rows = [row for row in read_metrics(folder / script, without=(*SPEED, "lr")) if "loss" in row]
    # Not what jumps (accuracies), and not the parts of a loss.
    names = [name for name in MEASURES if any(name in row for row in rows)]
    return {name: [row.get(name) for row in rows] for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", metavar="SCRIPT", help="none: all")
    parser.add_argument("--output", type=Path, default=PATH)
    parser.add_argument("--jitter", type=int, help="perturb the last bits of products, as the tests' option")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    found = {}
    for script in args.scripts or SCRIPTS:
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            if args.jitter is not None:
                stack.enter_context(Jitter(args.jitter))
            found[script] = losses_of(script, Path(folder))
    known = json.loads(args.output.read_text(encoding="utf-8")) if args.output.is_file() else {}
    lines = []
    for script, measures in sorted((known | found).items()):
        rows = [
            f"  {json.dumps(name)}: {json.dumps([v if v is None else float(f'{v:.8g}') for v in values])}"
            for name, values in measures.items()
        ]
        lines.append(f" {json.dumps(script)}: {{\n" + ",\n".join(rows) + "\n }")
    args.output.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
