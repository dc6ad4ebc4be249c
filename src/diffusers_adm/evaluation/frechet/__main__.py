"""
Compares samples with images: Frechet distance, inception score, precision, recall, diversity, accuracy.

    python -m diffusers_adm.evaluation.frechet --samples samples --reference path/to/images \\
      --features classifier:runs/classifier

Samples are a folder of `python -m diffusers_adm.evaluation.sample`, or any other images.
`accelerate launch -m diffusers_adm.evaluation.frechet ...` shares the images between processes; the results are the
same.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ...commands.arguments import arg, check_at_least, parse_args
from ...commands.errors import run_command
from ...commands.processes import join_processes
from ...conditioning.image_format import ImageFormat, ImageMode, Size, parse_size
from ...data.formats import FormatRequest, parse_value_range
from ...data.labels import match_classes
from ..common import require, versions
from ..data import format_of_run, load_classifier, read_images, run_of_sample
from .comparison import compare_image_sets
from .features import ClassifierFeatures, FeatureNetwork, InceptionFeatures


@dataclass
class Arguments:
    samples: list[str] = field(
        metadata={
            "help": "Samples: a folder of the command `sample` or any folder of images; a .npz file with `arr_0` (and "
            "`arr_1`, the classes); or parquet files."
        }
    )
    reference: list[str] = field(metadata={"help": "Images to compare with: as the samples, or a dataset on the Hub."})
    features: str = field(
        metadata={
            "help": "Feature network: classifier:PATH, an `AdaGNClassifierModel` in a folder or on the Hub that was "
            "not used for sampling (none comes with this package); inception; or inception:FILE with weights in "
            "torch-fidelity's format."
        }
    )
    dataset_config_name: str | None = arg(None, "Configuration of a reference on the Hub. Not for the samples.")
    split: str | None = arg(None, "Split of the reference, if it has several. Not for the samples.")
    image_column: str = arg("image", "Image column of the reference. Not for the samples.")
    image_mode: ImageMode | None = arg(
        None,
        "Meaning of the channels: L (grey), LA, RGB, RGBA (A is alpha), or array (no colours). None: that of the "
        "classifier or of the samples, or the one that follows from the number of channels.",
    )
    value_range: list[str] | None = arg(
        None,
        "Values of the data for -1 and 1, LOW HIGH; auto: measured over the samples. None: those of the classifier, of "
        "the samples, or the whole range of the integer type.",
    )
    resolution: Size | None = arg(
        None,
        "Image size in pixels: the side of a square, or HEIGHTxWIDTH. None: that of the classifier, or of the samples.",
        parse=functools.partial(parse_size, "resolution"),
    )
    num_images: int | None = arg(None, "Size of a random choice from either set. None: all images.")
    k: int = arg(3, "k of the k-nearest-neighbour manifold, for precision and recall.")
    splits: int = arg(10, "Splits of the inception score.")
    batch_size: int = arg(64, "Images per forward pass.")
    seed: int = arg(0, "Random seed of the choices, and of the order of the samples for the inception score.")
    cache_dir: str | None = arg(None, "Cache folder of datasets and models.")
    json: bool = arg(False, "Print JSON, with the settings and versions.")

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_images", "k", "splits", "batch_size")
        parse_value_range("value_range", self.value_range)


def load_features(
    features: str, cache_dir: str | None, device: torch.device
) -> tuple[FeatureNetwork, dict[int, str] | None]:
    """Loads the network, and the names of its classes if they are known."""
    kind, _, path = features.partition(":")
    if kind == "inception":
        return InceptionFeatures(path or None, device), None
    if kind != "classifier" or not path:
        raise ValueError(f"`features` is {features!r}; it must be classifier:PATH, inception or inception:FILE.")
    classifier, id2label = load_classifier("features", path, cache_dir)
    return ClassifierFeatures(classifier.to(device)), id2label


def renumber_classes(
    samples: Sequence[str], network: FeatureNetwork, id2label: dict[int, str] | None
) -> dict[int, int]:
    """From classes of the samples to the classifier's classes of the same names; empty: no change."""
    run = run_of_sample(samples)
    is_labelled = run is not None and run["settings"]["class_labels"] is not None and run["id2label"] is not None
    if not is_labelled or not isinstance(network, ClassifierFeatures):
        return {}
    names = {int(number): name for number, name in run["id2label"].items()}
    # A model may have more classes than were sampled, and than the classifier has.
    sampled = set(run["settings"]["class_labels"][: run["num_images"]])
    if all(names.get(number) in (id2label or {}).values() for number in sampled):
        names = {number: names[number] for number in sorted(sampled)}
    return match_classes(names, id2label, network.classifier.config.num_classes, by_number=True)


def request_format(args: Arguments, network: FeatureNetwork) -> FormatRequest:
    """What is asked of the images."""
    known: ImageFormat | None = getattr(network, "image_format", None)
    sampled = format_of_run(run_of_sample(args.samples)) or format_of_run(run_of_sample(args.reference))
    if known is not None and sampled is not None and known != sampled:
        low, high = sampled.value_range
        same_kind = dataclasses.replace(known, value_range=sampled.value_range, num_levels=sampled.num_levels)
        way_out = f"train the classifier with `--value_range {low:.9g} {high:.9g}`"
        if same_kind != sampled:
            way_out = f"train one with `--image_mode {sampled.mode} --value_range {low:.9g} {high:.9g}`"
        raise ValueError(
            f"The classifier was trained on {known}, but the samples are {sampled}. Features compare only images of "
            f"one format: {way_out}."
        )
    known = known or sampled
    channels = None if known is None else known.channels
    if known is None and args.image_mode is None:
        channels = 3  # of Inception
    return FormatRequest(channels, args.image_mode, parse_value_range("value_range", args.value_range), known)


def main(argv: Sequence[str] | None = None) -> None:
    (args,) = parse_args(Arguments, argv, description=__doc__)
    require("datasets")
    accelerator = join_processes("no")

    # 1. network
    with accelerator.main_process_first():  # the others find downloads in the cache
        network, id2label = load_features(args.features, args.cache_dir, accelerator.device)
    resolution = args.resolution or network.resolution

    # 2. images
    common = {"num_images": args.num_images, "seed": args.seed, "cache_dir": args.cache_dir}
    to_class = renumber_classes(args.samples, network, id2label)
    request = request_format(args, network)
    samples = read_images(args.samples, resolution, request=request, to_class=to_class, argument="samples", **common)
    if args.value_range == ["auto"]:  # once
        request = dataclasses.replace(request, value_range=samples.image_format.value_range)
    reference = read_images(
        args.reference,
        samples.resolution,
        request=request,
        dataset_config_name=args.dataset_config_name,
        split=args.split,
        image_column=args.image_column,
        argument="reference",
        **common,
    )

    # 3. measures
    result = compare_image_sets(
        network,
        samples,
        reference,
        k=args.k,
        splits=args.splits,
        batch_size=args.batch_size,
        seed=args.seed,
        accelerator=accelerator,
    )
    if accelerator.is_main_process and args.json:
        settings = vars(args) | {"resolution": samples.resolution, "image_format": samples.image_format.to_config()}
        print(json.dumps({**result.to_dict(), "settings": settings, "versions": versions()}, indent=1, allow_nan=False))
    elif accelerator.is_main_process:
        print(result)
    accelerator.end_training()


if __name__ == "__main__":
    run_command(main)
