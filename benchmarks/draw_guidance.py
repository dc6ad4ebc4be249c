"""
Figures of the effect of guidance, with the same noise in each row: prompts, classes, and an interval of the steps.

    python benchmarks/draw_guidance.py prompts --model DIR --output prompts.png
    python benchmarks/draw_guidance.py classes --model DIR --classifier DIR --output classes.png
    python benchmarks/draw_guidance.py interval --model DIR --output interval.png

`--model` is a pipeline: text-conditional for `prompts`, class-conditional with a null class for the others.
"""

import argparse

from measuring import grid_of_columns, make_parser, quiet, sample
from PIL import Image

from diffusers_adm import AdaGNClassifierModel, ADMPipeline
from diffusers_adm.training import labelled_grid


PROMPTS = ["grinning face", "red apple", "japan flag", "purple heart", "woman, medium skin tone", "blue square"]
CLASSES = ("Flags", "Smileys & Emotion", "People & Body")
SCALES = (1.0, 2.0, 4.0, 8.0)
CLASSIFIER_SCALES = (0.0, 1.0, 2.0, 4.0, 8.0)
INTERVALS = ((0.0, 1.0), (0.0, 0.5), (0.5, 1.0), (0.2, 0.8))
INTERVAL_SCALE = 4.0
INTERVAL_IMAGES = 9


def draw_prompts(pipe: ADMPipeline, args: argparse.Namespace) -> Image.Image:
    columns = [(f"{scale:g}", sample(pipe, args, {"prompt": args.prompts}, guidance_scale=scale)) for scale in SCALES]
    return grid_of_columns(columns, args.prompts, scale=args.scale)


def draw_classes(pipe: ADMPipeline, args: argparse.Namespace) -> Image.Image:
    def cell(scale: float, classifier_scale: float) -> Image.Image:
        scales = {"guidance_scale": scale, "classifier_guidance_scale": classifier_scale}
        images = sample(pipe, args, {"class_labels": list(CLASSES)}, **scales)
        return labelled_grid(images, 1, len(images), padding=1)

    columns = [(f"classifier {each:g}", [cell(scale, each) for scale in SCALES]) for each in CLASSIFIER_SCALES]
    return grid_of_columns(columns, [f"classifier-free {scale:g}" for scale in SCALES], scale=args.scale, padding=4)


def draw_interval(pipe: ADMPipeline, args: argparse.Namespace) -> Image.Image:
    images, names = [], [pipe.id2label[i % len(pipe.id2label)] for i in range(INTERVAL_IMAGES)]
    for start, end in ((0.0, 0.0), *INTERVALS):  # an empty interval is no guidance
        interval = {"guidance_start": start, "guidance_end": end}
        images += sample(pipe, args, {"class_labels": names}, guidance_scale=INTERVAL_SCALE, **interval)
    labels = ["off", *(f"steps {start:.0%} to {end:.0%}" for start, end in INTERVALS)]
    return labelled_grid(images, len(labels), INTERVAL_IMAGES, labels, names, scale=args.scale)


DRAWINGS = {"prompts": draw_prompts, "classes": draw_classes, "interval": draw_interval}


def main() -> None:
    parser = make_parser(__doc__, "model", "output", num_inference_steps=50, seed=0, scale=2)
    parser.add_argument("what", choices=DRAWINGS)
    parser.add_argument("--classifier", help="For `classes`: folder with the subfolder `classifier`.")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS, help="Prompts for `prompts`.")
    args = parser.parse_args()

    components = {}
    if args.classifier is not None:
        components["classifier"] = AdaGNClassifierModel.from_pretrained(args.classifier, subfolder="classifier")
    pipe = quiet(ADMPipeline.from_pretrained(args.model, **components))
    DRAWINGS[args.what](pipe, args).save(args.output)


if __name__ == "__main__":
    main()
