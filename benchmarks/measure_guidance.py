"""
Effect of guidance on samples: accuracy and diversity as functions of the scale, for both kinds.

    python benchmarks/measure_guidance.py --model DIR --classifier DIR --judge DIR --output_dir DIR

`--model` is a class-conditional pipeline with a null class, `--classifier` the noisy-image classifier that guides, and
`--judge` an independently trained classifier (another seed and width) that does not guide: its accuracy measures how
often a sample shows its class, and its penultimate layer the distance between samples, over all of them and within a
class. Classes are uniform, and every cell starts from the same noise. `--output_dir` gets the samples, so that an
interrupted run continues, a table (`guidance.json`), curves (`guidance.png`) and some samples (`samples.png`).
"""

import math
from pathlib import Path

import torch
from matplotlib.figure import Figure
from measuring import (
    features_and_classes,
    grid_of_columns,
    load_judge,
    make_parser,
    quiet,
    read_samples,
    with_errors,
    write_report,
)

from diffusers_adm import AdaGNClassifierModel, ADMPipeline
from diffusers_adm.evaluation import ClassifierFeatures, mean_pairwise_distance, sample_images
from diffusers_adm.training import load_id2label


OFF = "off"
# Fractions of the steps between which "middle" applies classifier-free guidance.
INTERVAL = {"guidance_start": 0.2, "guidance_end": 0.8}
# Name, colour and marker in the plot.
KINDS = {
    "classifier-free": ("classifier-free", "#1f77b4", "o"),
    "classifier": ("classifier", "#d62728", "s"),
    "middle": ("classifier-free, steps 20% to 80%", "#2ca02c", "^"),
}
MEASURES = {
    "accuracy": "accuracy under the judge",
    "diversity": "mean distance of features",
    "diversity_within_class": "mean distance within a class",
}


def options_of(kind: str, scale: float) -> dict[str, float]:
    if kind == "classifier":
        return {"classifier_guidance_scale": scale}
    return {"guidance_scale": scale} | (INTERVAL if kind == "middle" else {})


def measure(folder: Path, labels: torch.Tensor, judge: ClassifierFeatures) -> dict[str, float]:
    features, predicted = features_and_classes(judge, read_samples(folder, len(labels)))
    accuracy = (predicted == labels).double().mean().item()
    within = [mean_pairwise_distance(features[labels == label]) for label in labels.unique()]
    errors = math.sqrt(sum(error**2 for _, error in within))
    return {"num_images": len(labels)} | with_errors(
        accuracy=(accuracy, math.sqrt(accuracy * (1 - accuracy) / len(labels))),
        diversity=mean_pairwise_distance(features),
        diversity_within_class=(sum(mean for mean, _ in within) / len(within), errors / len(within)),
    )


def plot(cells: dict[str, dict[str, float]], scales: list[float], kinds: list[str], path: Path) -> None:
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, (measure_name, title) in zip(figure.subplots(1, len(MEASURES)), MEASURES.items(), strict=True):
        for kind in kinds:
            label, color, marker = KINDS[kind]
            rows = [cells[OFF]] + [cells[f"{kind}-{scale:g}"] for scale in scales]
            # Off is a scale of 1 or 0.
            positions = [0 if kind == "classifier" else 1, *scales]
            values = [row[measure_name] for row in rows]
            errors = [2 * row[f"{measure_name}_error"] for row in rows]
            axes.errorbar(positions, values, errors, color=color, marker=marker, capsize=3, label=label)
        axes.set(title=title, xlabel="scale")
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    settings = {"num_inference_steps": 25, "batch_size": 34, "seed": 0}
    parser = make_parser(__doc__, "model", "judge", "output_dir", **settings)
    parser.add_argument("--classifier", required=True, help="Folder with the subfolder `classifier`.")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--scales", type=float, nargs="+", default=[2.0, 4.0, 8.0])
    parser.add_argument("--images_per_class", type=int, default=34)
    args = parser.parse_args()

    pipe = quiet(ADMPipeline.from_pretrained(args.model))
    pipe.register_modules(classifier=AdaGNClassifierModel.from_pretrained(args.classifier, subfolder="classifier"))
    judge = load_judge(args.judge)
    for name in (args.classifier, args.judge):
        if load_id2label(name, "classifier") != pipe.id2label:
            raise ValueError(f"The classes of {name} are not those of the model, {pipe.id2label}, in this order.")
    num_classes = len(pipe.id2label)
    labels = torch.arange(num_classes).repeat(args.images_per_class)

    cells = {OFF: {}} | {f"{kind}-{scale:g}": options_of(kind, scale) for kind in args.kinds for scale in args.scales}
    results = {}
    for name, options in cells.items():
        folder = sample_images(
            pipe,
            len(labels),
            args.output_dir / name,
            class_labels=list(range(num_classes)),
            batch_size=args.batch_size,
            seed=args.seed,
            pipeline_options={"num_inference_steps": args.num_inference_steps, **options},
        )
        results[name] = row = measure(folder, labels, judge)
        numbers = (f"{key} {row[key]:.3f} ({row[f'{key}_error']:.3f})" for key in MEASURES)
        print(f"{name:20}", *numbers, flush=True)

    print("\nchange against off, in standard errors of the difference")
    off = results[OFF]
    for name, row in list(results.items())[1:]:
        errors = {key: math.hypot(row[f"{key}_error"], off[f"{key}_error"]) for key in MEASURES}
        print(f"{name:20}", *(f"{key} {(row[key] - off[key]) / error:+.1f}" for key, error in errors.items()))

    write_report(args.output_dir / "guidance.json", args, cells=results)
    plot(results, args.scales, args.kinds, args.output_dir / "guidance.png")
    columns = [(name, read_samples(args.output_dir / name, num_classes)) for name in cells]
    grid_of_columns(columns, list(pipe.id2label.values()), scale=2).save(args.output_dir / "samples.png")


if __name__ == "__main__":
    main()
