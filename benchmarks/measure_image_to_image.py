"""
Quality of an image to image model on held-out pairs, against the input itself.

    python benchmarks/measure_image_to_image.py --model DIR --data_files data/noto-emoji-32/test.parquet \
        --source grayscale --output_dir DIR
    python benchmarks/measure_image_to_image.py --model DIR --data_files twemoji-emoji-64-test.parquet \
        --source_data_files noto-emoji-64-test.parquet --pair_column unified text --output_dir DIR

`--model` is an `ADMImageToImagePipeline`, `--data_files` are its held-out targets. The source images are found as by
training/train_image_to_image.py. Each is translated by the pipeline, once for each guidance scale:

- `psnr` (dB) and `ssim`: distance to the targets; `psnr_input`, `ssim_input`: the same for the input, its channels
  repeated if it is grey; left out if its channels are others than the target's. Plausible colours or details that
  differ from the target's score lower than blurred ones.
- `psnr_difference`: the mean over images of `psnr` minus `psnr_input`.

Means over images with standard errors. `--output_dir` gets the table (`image_to_image.json`) and some images
(`samples.png`: input, sample, target).
"""

import time

import torch
from measuring import conditions_of, make_parser, mean_and_error, quiet, seeded, spread, with_errors, write_report

from diffusers_adm import ADMImageToImagePipeline
from diffusers_adm.conditioning.image_format import describe_size
from diffusers_adm.conditioning.previews import preview
from diffusers_adm.training import ImageToImageArguments, check_images, labelled_strips, load_image_dataset, psnr, ssim
from diffusers_adm.training.validation import same_size, to_pipeline


def measure(samples: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """All measures of images in [0, 1], with their standard errors."""
    images = {"": samples}
    if sources.shape[1] in (1, targets.shape[1]):
        images["_input"] = sources.expand_as(targets)
    values = {
        f"{name}{end}": [
            function(*(x.double().numpy() for x in pair), 1.0) for pair in zip(given, targets, strict=True)
        ]
        for name, function in (("psnr", psnr), ("ssim", ssim))
        for end, given in images.items()
    }
    if "psnr_input" in values:
        values["psnr_difference"] = [a - b for a, b in zip(values["psnr"], values["psnr_input"], strict=True)]
    return with_errors(**{name: mean_and_error(numbers) for name, numbers in values.items()})


def main() -> None:
    settings = {"num_shown": 16, "num_inference_steps": 25, "batch_size": 41, "seed": 0, "scale": 2}
    columns = {"image_column": "image", "label_column": "label", "caption_column": "text"}
    parser = make_parser(__doc__, "model", "data_files", "output_dir", **columns, **settings)
    parser.add_argument("--source", help="Kind of source image to make from each target.")
    parser.add_argument("--source_column", help="Column of the source images.")
    parser.add_argument("--source_data_files", nargs="+", help="Parquet files of the source images.")
    parser.add_argument("--pair_column", nargs="+", help="Columns that source and target have in common.")
    parser.add_argument("--guidance_scales", type=float, nargs="+", default=[1.0])
    parser.add_argument("--max_images", type=int, help="Use only the first images.")
    args = parser.parse_args()

    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = quiet(ADMImageToImagePipeline.from_pretrained(args.model)).to(args.device)
    names = ("source", "source_column", "source_data_files", "pair_column")
    pairs = ImageToImageArguments(**{name: getattr(args, name) for name in names})
    data = {"data_files": args.data_files, "image_column": args.image_column, "cache_dir": None}
    dataset, id2label = load_image_dataset(
        **data,
        label_column=None if pipe.unet.config.num_class_embeds is None else args.label_column,
        caption_column=args.caption_column if pipe.has_cross_attention else None,
        conditioning_image_column=pairs.column,
    )
    dataset = pairs.pair(dataset, data)
    dataset = dataset.select(range(min(args.max_images or len(dataset), len(dataset))))
    size, formats = pipe.unet.config.sample_size, {"image_format": pipe.image_format}
    if pairs.source is None:
        formats["condition_format"] = pipe.source_format
    dataset, _ = check_images(dataset, size, **formats)
    examples = [*pairs.dataset_class()(dataset, size, center_crop=True, **formats)]
    targets, sources = (torch.stack([example[name] for example in examples]) for name in ("images", "conditions"))
    targets, inputs = targets / 2 + 0.5, to_pipeline(2 * sources - 1, pipe.source_format)
    given = conditions_of(pipe, dataset, id2label)

    cells, shown = {}, None
    print(f"{len(targets)} pairs of {describe_size(size)} pixels, {args.num_inference_steps} steps", flush=True)
    for guidance_scale in args.guidance_scales:
        start, batches = time.perf_counter(), []
        for first in range(0, len(targets), args.batch_size):
            batch = slice(first, first + args.batch_size)
            generators = seeded(args.seed + first, len(targets[batch]))
            options = {name: values[batch] for name, values in given.items()}
            options |= {"num_inference_steps": args.num_inference_steps, "guidance_scale": guidance_scale}
            latents = pipe(inputs[batch], **options, generator=generators, output_type="latent").images
            batches.append((latents.cpu() / 2 + 0.5).clamp(0, 1))
        samples = torch.cat(batches)
        seconds_per_image = (time.perf_counter() - start) / len(samples)
        cell = measure(samples, sources, targets)
        cells[f"guidance-{guidance_scale:g}"] = cell | {"num_images": len(samples)} | {"seconds": seconds_per_image}
        numbers = (f"{key} {cell[key]:.3f} ({cell[f'{key}_error']:.3f})" for key in cell if not key.endswith("_error"))
        print(f"guidance {guidance_scale:<4g}", *numbers, f"{seconds_per_image:.2f} s per image", sep="  ", flush=True)
        shown = samples if shown is None else shown

    write_report(args.output_dir / "image_to_image.json", args, cells=cells)
    chosen = spread(len(targets), args.num_shown)
    columns = {"input": (sources, pipe.source_format), "sample": (shown, pipe.image_format)}
    columns["target"] = (targets, pipe.image_format)
    strips = {name: preview(2 * images[chosen] - 1, kind) for name, (images, kind) in columns.items()}
    labelled_strips(same_size(strips), scale=args.scale).save(args.output_dir / "samples.png")


if __name__ == "__main__":
    main()
