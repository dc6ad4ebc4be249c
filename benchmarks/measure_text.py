"""
Whether images match their captions, for captions of the training set and held-out ones.

    python benchmarks/measure_text.py --model DIR --judge DIR --output_dir DIR

`--model` is a text-conditional pipeline, `--judge` an independently trained classifier of the categories of the real
images. One sample is generated for each caption, without its class. Two measures, each also for shuffled captions (the
mean over all other captions of the set):

- category: the judge assigns the sample to the category of the caption's image;
- picture: the nearest of all real images (Euclidean distance of pixels) is that of the caption.

The training captions have the same number of each category as the held-out set.
"""

import math

import datasets
import numpy as np
import torch
from measuring import (
    EMOJI,
    features_and_classes,
    load_judge,
    make_parser,
    pixels_of,
    quiet,
    read_samples,
    write_report,
)

from diffusers_adm import ADMPipeline
from diffusers_adm.evaluation import sample_images
from diffusers_adm.training import labelled_grid


SETS = ("training", "held-out")
NUM_SHOWN = 16


def same_categories(dataset: datasets.Dataset, reference: datasets.Dataset, seed: int) -> datasets.Dataset:
    """A random subset with as many examples of each category as `reference`, in the order of its categories."""
    generator, labels = np.random.default_rng(seed), np.array(dataset["label"])
    counts = np.bincount(reference["label"], minlength=labels.max() + 1)
    chosen = [generator.choice(np.flatnonzero(labels == c), n, replace=False) for c, n in enumerate(counts)]
    return dataset.select(np.concatenate(chosen))


def compare(is_match: torch.Tensor) -> dict[str, float]:
    """
    The fraction of matches, that of shuffled captions, and the difference in standard errors.

    Args:
        is_match (`torch.Tensor` of shape `(n, n)`): Whether sample i matches caption j.
    """
    n, matches = len(is_match), is_match.double()
    own = matches.diagonal()
    others = (matches.sum(dim=1) - own) / (n - 1)
    gain = own - others
    return {
        "matched": own.mean().item(),
        "matched_error": own.std().item() / math.sqrt(n),
        "shuffled": others.mean().item(),
        "gain_in_errors": gain.mean().item() / max(gain.std().item() / math.sqrt(n), 1e-12),
    }


def main() -> None:
    files = {"train_file": f"{EMOJI}/train.parquet", "test_file": f"{EMOJI}/test.parquet"}
    settings = {"num_inference_steps": 25, "batch_size": 41, "seed": 0}
    parser = make_parser(__doc__, "model", "judge", "output_dir", **files, **settings)
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 3.0, 5.0])
    args = parser.parse_args()

    pipe, judge = quiet(ADMPipeline.from_pretrained(args.model)), load_judge(args.judge)
    data = datasets.load_dataset("parquet", data_files={"train": args.train_file, "test": args.test_file})
    subset = same_categories(data["train"], data["test"], args.seed)
    results = {}
    for name, examples in zip(SETS, (subset, data["test"]), strict=True):
        labels, real = torch.tensor(examples["label"]), list(examples["image"])
        shown = torch.linspace(0, len(labels) - 1, NUM_SHOWN).long().tolist()
        cells = [real[i] for i in shown]
        for scale in args.scales:
            folder = sample_images(
                pipe,
                len(examples),
                args.output_dir / f"{name}-{scale:g}",
                prompts=list(examples["text"]),
                batch_size=args.batch_size,
                seed=args.seed,
                pipeline_options={"num_inference_steps": args.num_inference_steps, "guidance_scale": scale},
            )
            images = read_samples(folder, len(examples))
            cells += [images[i] for i in shown]
            _, predicted = features_and_classes(judge, images)
            distances = torch.cdist(*(pixels_of(each).flatten(1).double() for each in (images, real)))
            row = {
                "category": compare(predicted[:, None] == labels[None, :]),
                "picture": compare(distances == distances.amin(dim=1, keepdim=True)),
            }
            results[f"{name}-{scale:g}"] = row
            for measure, values in row.items():
                matched = f"{values['matched']:.3f} ({values['matched_error']:.3f})"
                shuffled = f"{values['shuffled']:.3f}: {values['gain_in_errors']:+.1f} standard errors"
                print(f"{name:9} guidance {scale:<4g} {measure:9} {matched}, shuffled {shuffled}", flush=True)
        labels_of_rows = ["real", *(f"guidance {scale:g}" for scale in args.scales)]
        captions = [examples[i]["text"] for i in shown]
        grid = labelled_grid(cells, len(labels_of_rows), NUM_SHOWN, labels_of_rows, captions, scale=2)
        grid.save(args.output_dir / f"{name}.png")
    _, predicted = features_and_classes(judge, real)
    print(f"the judge on the held-out images: {(predicted == labels).double().mean():.3f}")
    write_report(args.output_dir / "text.json", args, results=results)


if __name__ == "__main__":
    main()
