"""
Figures of the effect of guidance, with the same noise in each row: prompts, classes, and an interval of the steps.

    python benchmarks/draw_guidance.py prompts --model DIR --output prompts.png
    python benchmarks/draw_guidance.py classes --model DIR --classifier DIR --output classes.png
    python benchmarks/draw_guidance.py interval --model DIR --output interval.png

`--model` is a pipeline: text-conditional for `prompts`, class-conditional with a null class for the others.
"""

import argparse

from measuring import make_parser, quiet, seeded
from PIL import Image

from diffusers_adm import AdaGNClassifierModel, ADMPipeline
from diffusers_adm.training import labelled_grid


PROMPTS = ("grinning face", "red apple", "japan flag", "purple heart", "woman, medium skin tone", "blue square")
CLASSES = ("Flags", "Smileys & Emotion", "People & Body")
SCALES = (1.0, 2.0, 4.0, 8.0)
CLASSIFIER_SCALES = (0.0, 1.0, 2.0, 4.0, 8.0)
INTERVALS = ((0.0, 1.0), (0.0, 0.5), (0.5, 1.0), (0.2, 0.8))
INTERVAL_SCALE = 4.0
INTERVAL_IMAGES = 9


def draw_prompts(pipe: ADMPipeline, args: argparse.Namespace) -> Image.Image:
    prompts = args.prompts or list(PROMPTS)
    options = {"num_inference_steps": args.num_inference_steps}
    columns = [
        pipe(prompts, guidance_scale=scale, generator=seeded(args.seed, len(prompts)), **options).images
        for scale in SCALES
    ]
    return labelled_grid(
        [image for row in zip(*columns, strict=True) for image in row],
        len(prompts),
        len(SCALES),
        row_labels=prompts,
        col_labels=[f"{scale:g}" for scale in SCALES],
        scale=args.scale,
    )


def draw_classes(pipe: ADMPipeline, args: argparse.Namespace) -> Image.Image:
    cells = []
    for scale in SCALES:
        for classifier_scale in CLASSIFIER_SCALES:
            images = pipe(
                class_labels=list(CLASSES),
                guidance_scale=scale,
                classifier_guidance_scale=classifier_scale,
                num_inference_steps=args.num_inference_steps,
                generator=seeded(args.seed, len(CLASSES)),
            ).images
            cells.append(labelled_grid(images, 1, len(images), padding=1))
    return labelled_grid(
        cells,
        len(SCALES),
        len(CLASSIFIER_SCALES),
        row_labels=[f"classifier-free {scale:g}" for scale in SCALES],
        col_labels=[f"classifier {scale:g}" for scale in CLASSIFIER_SCALES],
        scale=args.scale,
        padding=4,
    )


def draw_interval(pipe: ADMPipeline, args: argparse.Namespace) -> Image.Image:
    images, class_names = [], [pipe.id2label[i % len(pipe.id2label)] for i in range(INTERVAL_IMAGES)]
    for start, end in ((0.0, 0.0), *INTERVALS):  # an empty interval is no guidance
        images += pipe(
            class_labels=class_names,
            guidance_scale=INTERVAL_SCALE,
            guidance_start=start,
            guidance_end=end,
            num_inference_steps=args.num_inference_steps,
            generator=seeded(args.seed, INTERVAL_IMAGES),
        ).images
    labels = ["off", *(f"steps {start:.0%} to {end:.0%}" for start, end in INTERVALS)]
    return labelled_grid(
        images, len(labels), INTERVAL_IMAGES, row_labels=labels, col_labels=class_names, scale=args.scale
    )


DRAWINGS = {"prompts": draw_prompts, "classes": draw_classes, "interval": draw_interval}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("what", choices=DRAWINGS)
    parser.add_argument("--model", required=True)
    parser.add_argument("--classifier", help="For `classes`: folder with the subfolder `classifier`.")
    parser.add_argument("--prompts", nargs="+", help="Prompts for `prompts`.")
    parser.add_argument("--output", required=True)
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="Random seed of the first image; the others follow.")
    parser.add_argument("--scale", type=int, default=2, help="Magnification.")
    args = parser.parse_args()

    components = {}
    if args.classifier is not None:
        components["classifier"] = AdaGNClassifierModel.from_pretrained(args.classifier, subfolder="classifier")
    pipe = quiet(ADMPipeline.from_pretrained(args.model, **components))
    DRAWINGS[args.what](pipe, args).save(args.output)


if __name__ == "__main__":
    main()
