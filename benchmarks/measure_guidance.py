"""
Effect of guidance on samples: accuracy and diversity as functions of the scale, for both kinds.

    python benchmarks/measure_guidance.py --model DIR --classifier DIR --judge DIR --output_dir DIR

`--model` is a class-conditional pipeline with a null class, `--classifier` the noisy-image classifier that guides, and
`--judge` an independently trained classifier (another seed and width) that does not guide: its accuracy measures how
often a sample shows its class, and its penultimate layer the distance between samples, over all of them and within a
class. Classes are uniform, and every cell starts from the same noise. `--output_dir` gets the samples, so that an
interrupted run continues, a table (`guidance.json`), curves (`guidance.png`) and some samples (`samples.png`).
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from measuring import make_parser, pixels_of, quiet, write_report
from PIL import Image

from diffusers_adm import AdaGNClassifierModel, ADMPipeline
from diffusers_adm.evaluation.frechet import ClassifierFeatures, mean_pairwise_distance
from diffusers_adm.evaluation.sample import sample_images
from diffusers_adm.training import labelled_grid, load_id2label


KINDS = ("classifier-free", "classifier", "middle")
OFF = "off"
# Fractions of the steps between which "middle" applies classifier-free guidance.
INTERVAL = {"guidance_start": 0.2, "guidance_end": 0.8}
STYLES = {"classifier-free": ("#1f77b4", "o"), "classifier": ("#d62728", "s"), "middle": ("#2ca02c", "^")}
NAMES = {
    "classifier-free": "classifier-free",
    "classifier": "classifier",
    "middle": "classifier-free, steps 20% to 80%",
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
    paths = [folder / f"{i:06d}.png" for i in range(len(labels))]
    outputs = [judge(batch) for batch in pixels_of([Image.open(path) for path in paths]).split(64)]
    features, logits = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    accuracy = (logits.argmax(dim=1) == labels).double().mean().item()
    diversity, diversity_error = mean_pairwise_distance(features)
    within = [mean_pairwise_distance(features[labels == label]) for label in labels.unique()]
    return {
        "num_images": len(labels),
        "accuracy": accuracy,
        "accuracy_error": math.sqrt(accuracy * (1 - accuracy) / len(labels)),
        "diversity": diversity,
        "diversity_error": diversity_error,
        "diversity_within_class": sum(mean for mean, _ in within) / len(within),
        "diversity_within_class_error": math.sqrt(sum(error**2 for _, error in within)) / len(within),
    }


def plot(cells: dict[str, dict[str, float]], scales: list[float], kinds: list[str], path: Path) -> None:
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (measure_name, title) in zip(figure.subplots(1, len(MEASURES)), MEASURES.items(), strict=True):
        for kind in kinds:
            color, marker = STYLES[kind]
            rows = [cells[OFF]] + [cells[f"{kind}-{scale:g}"] for scale in scales]
            # Off is a scale of 1 or 0.
            positions = [0 if kind == "classifier" else 1, *scales]
            values = [row[measure_name] for row in rows]
            errors = [2 * row[f"{measure_name}_error"] for row in rows]
            axes.errorbar(positions, values, errors, color=color, marker=marker, capsize=3, label=NAMES[kind])
        axes.set(title=title, xlabel="scale")
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--classifier", required=True, help="Folder with the subfolder `classifier`.")
    parser.add_argument("--judge", required=True, help="Folder with the subfolder `classifier`.")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--scales", type=float, nargs="+", default=[2.0, 4.0, 8.0])
    parser.add_argument("--images_per_class", type=int, default=34)
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--batch_size", type=int, default=34)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    pipe = quiet(ADMPipeline.from_pretrained(args.model))
    pipe.register_modules(classifier=AdaGNClassifierModel.from_pretrained(args.classifier, subfolder="classifier"))
    judge = ClassifierFeatures(AdaGNClassifierModel.from_pretrained(args.judge, subfolder="classifier"))
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
        results[name] = measure(folder, labels, judge)
        print(
            f"{name:20}",
            *(f"{key} {results[name][key]:.3f} ({results[name][f'{key}_error']:.3f})" for key in MEASURES),
            flush=True,
        )

    print("\nchange against off, in standard errors of the difference")
    for name in cells:
        if name == OFF:
            continue
        changes = {}
        for key in MEASURES:
            error = math.hypot(results[name][f"{key}_error"], results[OFF][f"{key}_error"])
            changes[key] = (results[name][key] - results[OFF][key]) / error
        print(f"{name:20}", *(f"{key} {change:+.1f}" for key, change in changes.items()))

    write_report(args.output_dir / "guidance.json", args, "cpu", cells=results)
    plot(results, args.scales, args.kinds, args.output_dir / "guidance.png")
    images = [Image.open(args.output_dir / name / f"{i:06d}.png") for i in range(num_classes) for name in cells]
    grid = labelled_grid(
        images, num_classes, len(cells), row_labels=list(pipe.id2label.values()), col_labels=list(cells), scale=2
    )
    grid.save(args.output_dir / "samples.png")


if __name__ == "__main__":
    main()
