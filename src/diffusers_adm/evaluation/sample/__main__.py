"""
Generates many images with a saved model into a folder, or a `.npz` file.

    python -m diffusers_adm.evaluation.sample --model runs/mine --num_images 1000 --output_dir samples \\
      --class_labels uniform --guidance_scale 2

`accelerate launch -m diffusers_adm.evaluation.sample ...` shares the images between processes. The same command
continues an interrupted run. Images depend only on the seed and on their number, not on batches and processes.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import diffusers
import torch

from ...commands.arguments import arg, check_at_least, parse_args
from ...commands.effects import Rule, check_effects
from ...commands.errors import did_you_mean, run_command
from ...commands.processes import MixedPrecision, join_processes
from ...data.columns import load_image_dataset
from ...data.labels import UNLABELLED, match_classes
from ...data.repositories import check_can_be_written, reading
from ...data.seeding import derive_seed
from ...pipelines import ADMPipeline
from ..common import REVISION_RULE, require
from ..data import find_dataset, load_classifier
from .images import OutputFormat, sample_images


logger = logging.getLogger(__name__)

# Arguments that are passed to the pipeline unchanged; None: its own default.
PIPELINE_OPTIONS = (
    *("negative_prompt", "num_inference_steps", "timestep_respacing", "guidance_scale", "guidance_rescale"),
    *("guidance_start", "guidance_end", "classifier_guidance_scale", "eta"),
)
RULES = (
    Rule(
        ("dataset_config_name", "split", "label_column"),
        lambda given: given["dataset"] is not None,
        "it belongs to a `dataset`, and none was passed",
        refused=True,
    ),
    Rule(
        ("guidance_rescale", "negative_prompt"),
        lambda given: given["guidance_scale"] not in (None, 1),
        "it belongs to classifier-free guidance, which is off: `guidance_scale` is {guidance_scale}",
        refused=True,
    ),
    Rule(
        ("guidance_start", "guidance_end"),
        lambda given: given["guidance_scale"] not in (None, 1) or bool(given["classifier_guidance_scale"]),
        "nothing is guided without `guidance_scale` or `classifier_guidance_scale`",
        refused=True,
    ),
    Rule(
        ("classifier",),  # it may also give the classes their names
        lambda given: bool(given["classifier_guidance_scale"]) or given["class_labels"] is not None,
        "nothing is guided by it without `classifier_guidance_scale`",
        refused=True,
    ),
    REVISION_RULE,
)


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Pipeline, on the Hub or in a folder."})
    num_images: int = field(metadata={"help": "Number of images, over all processes."})
    output_dir: str = field(metadata={"help": "Folder for the images; that of an interrupted run to continue it."})
    output_format: OutputFormat | None = arg(
        None,
        "Single files, or samples.npz as expected by guided-diffusion's scripts, of values of the data that the model "
        "was trained on. None: png for grey of 8 or 16 bits and colours of 8, tiff for other images.",
    )
    seed: int = arg(0, "Random seed of the noise.")
    batch_size: int = arg(32, "Images per process and batch.")

    class_labels: str | None = arg(
        None,
        "Classes of the images: uniform, all in turn; data, as frequent as in `--dataset`; or the number or name of "
        "one. None: no labels, which is the null class of a network with classes.",
    )
    dataset: list[str] | None = arg(
        None, "Dataset for `--class_labels data`: a folder of images, parquet files, or a dataset on the Hub."
    )
    dataset_config_name: str | None = arg(None, "Configuration of a dataset on the Hub.")
    split: str | None = arg(None, "Split of the dataset, if it has several.")
    label_column: str = arg("label", "Label column of the dataset.")
    prompt: list[str] | None = arg(None, "Prompts, used in turn.")
    prompts_file: str | None = arg(None, "Or a text file with one prompt per line; blank lines are skipped.")
    negative_prompt: str | None = arg(None, "Prompt to guide away from, instead of the empty one.")

    num_inference_steps: int | None = arg(None, "Number of steps. None: the pipeline's default.")
    timestep_respacing: str | None = arg(None, "Instead of the number of steps: 250, ddim50, or 10,10,15.")
    eta: float | None = arg(None, "Noise of DDIM steps, 0 to 1. None: ancestral steps with the model's own scheduler.")
    scheduler: str | None = arg(None, "Name of another scheduler of diffusers, made from the model's scheduler config.")
    guidance_scale: float | None = arg(None, "Scale of classifier-free guidance; 1 is off.")
    guidance_start: float | None = arg(None, "Fraction of the steps at which guidance starts.")
    guidance_end: float | None = arg(None, "Fraction of the steps at which guidance ends.")
    guidance_rescale: float | None = arg(None, "0 to 1: reduces overexposure by guidance.")
    classifier_guidance_scale: float | None = arg(None, "Scale of classifier guidance; 0 is off.")
    classifier: str | None = arg(None, "Classifier, on the Hub or in a folder. None: the one saved with the model.")

    revision: str | None = arg(None, "Branch, tag or commit of the model.")
    variant: str | None = arg(None, "Variant of the weights, e.g. fp16.")
    cache_dir: str | None = arg(None, "Cache folder of models and datasets.")
    dtype: Literal["float32", "float16", "bfloat16"] = arg("float32", "Dtype of the weights.")
    mixed_precision: MixedPrecision | None = arg(None, "None: as configured for Accelerate.")

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_images", "batch_size")
        if self.prompt is not None and self.prompts_file is not None:
            raise ValueError(f"`prompt` and `prompts_file` {self.prompts_file!r} were both passed. Pass one of them.")
        if (self.class_labels == "data") != (self.dataset is not None):
            raise ValueError(
                f"`class_labels` is {self.class_labels!r} and `dataset` is {self.dataset}. `--class_labels data` needs "
                "a `--dataset`, whose classes are counted; nothing else does."
            )
        if self.dataset is not None:
            require("datasets")
        known = [name for name in dir(diffusers) if name.endswith("Scheduler")]
        if self.scheduler is not None and self.scheduler not in known:
            hint = did_you_mean(self.scheduler, known)
            raise ValueError(f"`scheduler` is {self.scheduler!r}, which is no scheduler of diffusers.{hint}")
        check_effects(self, rules=RULES)


def load_pipeline(args: Arguments) -> ADMPipeline:
    dtype = getattr(torch, args.dtype)
    given, names = {}, None
    if args.classifier is not None:
        given["classifier"], names = load_classifier("classifier", args.classifier, args.cache_dir, dtype=dtype)
    with reading("model", args.model):
        pipe = ADMPipeline.from_pretrained(
            args.model, revision=args.revision, variant=args.variant, cache_dir=args.cache_dir, dtype=dtype, **given
        )
    if names is not None and pipe.id2label is None:
        pipe.register_to_config(id2label={str(number): name for number, name in names.items()})
    elif names is not None:
        for number, name in pipe.id2label.items():
            if names.get(number, name) != name:
                raise ValueError(
                    f"Class {number} of `classifier` {args.classifier!r} is {names[number]!r}, but that of `model` "
                    f"{args.model!r} is {name!r}. Train the classifier on the same classes in this order."
                )
    if args.scheduler is not None:
        pipe.scheduler = getattr(diffusers, args.scheduler).from_config(pipe.scheduler.config)
    return pipe


def choose_classes(args: Arguments, pipe: ADMPipeline) -> list[int] | None:
    """The classes of the images, which take them in turn; None for no labels."""
    if args.class_labels is None:
        return None
    config, classes = pipe.unet.config, None
    is_unconditional = config.get("class_embed_type") is None and config.num_class_embeds is None
    if is_unconditional and pipe.classifier is not None:
        classes = list(range(pipe.classifier.config.num_classes))
    elif config.get("class_embed_type") is None and config.num_class_embeds is not None:
        classes = [label for label in range(config.num_class_embeds) if label != config.get("null_class_id")]
    if args.class_labels in ("uniform", "data") and classes is None:
        raise ValueError(
            f"`class_labels` is {args.class_labels!r}, but the network has no class embedding table. Omit it, or guide "
            "with a `--classifier`."
        )
    if is_unconditional and pipe.classifier is not None and not args.classifier_guidance_scale:
        raise ValueError(
            f"`class_labels` is {args.class_labels!r}, but the network is unconditional and nothing guides towards "
            "them. Pass `--classifier_guidance_scale`, or omit `--class_labels`."
        )
    if args.class_labels == "uniform":
        return classes
    if args.class_labels == "data":
        images, id2label = load_image_dataset(
            **find_dataset(args.dataset, args.dataset_config_name, args.split),
            label_column=args.label_column,
            cache_dir=args.cache_dir,
        )
        to_class = match_classes(id2label, pipe.id2label, len(classes), by_number=True)
        classes = [to_class[label] for label in images["label"][:] if label != UNLABELLED]
        # In random order, so that as many samples as the dataset has images have exactly its class frequencies.
        random.Random(derive_seed(args.seed, "classes of the data")).shuffle(classes)
        return classes
    if args.class_labels.isdecimal():
        return [int(args.class_labels)]
    numbers = {name: number for number, name in (pipe.id2label or {}).items()}
    if args.class_labels not in numbers:
        raise ValueError(
            f"`class_labels` is {args.class_labels!r}. It must be uniform, data, none, a number, or one of the classes "
            f"of the model: {', '.join(numbers) or 'it names none'}."
        )
    return [numbers[args.class_labels]]


def read_prompts(args: Arguments) -> list[str] | None:
    if args.prompts_file is None:
        return args.prompt
    with reading("prompts_file", args.prompts_file):
        lines = Path(args.prompts_file).read_text(encoding="utf-8").splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"`prompts_file` {args.prompts_file!r} holds no prompts. Write one per line.")
    return prompts


def main(argv: Sequence[str] | None = None) -> None:
    (args,) = parse_args(Arguments, argv, description=__doc__)
    check_can_be_written("output_dir", args.output_dir)
    prompts = read_prompts(args)
    accelerator = join_processes(args.mixed_precision)
    diffusers.utils.logging.disable_progress_bar()

    with accelerator.main_process_first():  # the others find downloads in the cache
        pipe = load_pipeline(args)
        class_labels = choose_classes(args, pipe)
    path = sample_images(
        pipe.to(accelerator.device),
        args.num_images,
        args.output_dir,
        class_labels=class_labels,
        prompts=prompts,
        batch_size=args.batch_size,
        seed=args.seed,
        output_format=args.output_format,
        pipeline_options={name: getattr(args, name) for name in PIPELINE_OPTIONS if getattr(args, name) is not None},
        accelerator=accelerator,
    )
    if accelerator.is_main_process:
        print(f"{args.num_images} images in {path}")
    accelerator.end_training()


if __name__ == "__main__":
    run_command(main)
