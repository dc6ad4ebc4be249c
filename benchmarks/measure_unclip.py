"""
Whether an unCLIP decoder generates the images that CLIP image embeddings describe.

    python benchmarks/measure_unclip.py --model DIR --data_files data/noto-emoji-64/test.parquet --output_dir DIR

The embeddings are those of held-out images, by the image encoder of the pipeline. Each is decoded once, without a
prompt, and the sample is encoded again. Its cosine similarity to the embedding that it was given is compared with that
to the embedding of another image, and with the similarity that the image itself has after the autoencoder. Embeddings
of one CLIP are all similar to each other, so the share of samples whose own embedding is the most similar one of all,
and among the five most similar ones, is reported, too.

Interpolation: between the embeddings of `--num_pairs` pairs of images, on the sphere and from one noise, `--num_points`
images are generated. Their similarity to the first end should fall along the path, and that to the second end rise.
Errors are standard errors over images, or over pairs.
"""

import torch
import torch.nn.functional as F
from measuring import (
    conditions_of,
    grid_of_columns,
    load_held_out,
    make_parser,
    mean_and_error,
    quiet,
    reconstruct,
    sample,
    seeded,
    with_errors,
    write_report,
)
from PIL import Image

from diffusers_adm import ADMUnCLIPPipeline
from diffusers_adm.conditioning.image_format import as_size


NUM_SHOWN = 10


@torch.no_grad()
def embed(pipe: ADMUnCLIPPipeline, images: list[Image.Image]) -> torch.Tensor:
    """Embeddings of images by the image encoder of the pipeline, `(N, width)`."""
    return torch.cat(
        [pipe.encode_image(images[start : start + 50]).float().cpu() for start in range(0, len(images), 50)]
    )


def similarities(found: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """Cosine similarity of each embedding `(N, width)` to all of `(M, width)`: `(N, M)`."""
    return F.normalize(found, dim=1) @ F.normalize(given, dim=1).T


def agreement(found: torch.Tensor, given: torch.Tensor) -> dict[str, float]:
    """
    Similarity of samples to the embeddings that they were given (`own`), to those of the next image (`shuffled`), their
    difference, and the share of samples whose own embedding is the nearest, or among the five nearest ones.
    """
    all_pairs = similarities(found, given)
    own, shuffled = all_pairs.diagonal(), all_pairs.roll(-1, dims=1).diagonal()
    rank = (all_pairs > own[:, None]).sum(dim=1)  # 0: nothing is more similar
    values = {"own": own, "shuffled": shuffled, "difference": own - shuffled}
    values |= {"nearest": (rank == 0).float(), "among_5": (rank < 5).float()}
    return with_errors(**{name: mean_and_error(each) for name, each in values.items()})


def is_monotone(path: torch.Tensor) -> dict[str, float]:
    """
    Of similarities along a path, `(points, 2)`, to its first and to its second end: the share of steps in the right
    direction, 1 if all are, and the same of the difference of both similarities.
    """
    steps = path.diff(dim=0) * torch.tensor([-1.0, 1.0])
    right, towards = (steps > 0).float(), (steps.sum(dim=1) > 0).float()
    return {
        "steps_right": right.mean().item(),
        "monotone": float(right.all()),
        "difference_monotone": float(towards.all()),
    }


def report(name: str, row: dict[str, float]) -> None:
    numbers = ", ".join(
        f"{key} {row[key]:.3f} ({row[f'{key}_error']:.3f})" for key in row if not key.endswith("_error")
    )
    print(f"{name:14} {numbers}", flush=True)


def main() -> None:
    settings = {"num_images": 163, "num_pairs": 20, "num_points": 7, "num_inference_steps": 25, "guidance_scale": 2.0}
    settings |= {"batch_size": 41, "seed": 0}
    columns_of = {"label_column": None, "caption_column": "text"}
    parser = make_parser(__doc__, "model", "data_files", "output_dir", **columns_of, **settings)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)

    pipe = quiet(ADMUnCLIPPipeline.from_pretrained(args.model))
    size = as_size(pipe.unet.config.sample_size)[0] * pipe.vae_scale_factor
    data, id2label, images = load_held_out(args, size)
    number, given = len(images), embed(pipe, images)

    columns = {"image": images}
    if pipe.vae is not None:
        columns["autoencoder"] = reconstruct(pipe, images)
    columns["variation"] = sample(pipe, args, {"image_embeds": given})
    if pipe.has_text:
        prompts = conditions_of(pipe, data, id2label)["prompt"]
        columns["and caption"] = sample(pipe, args, {"image_embeds": given, "prompt": prompts})
        learned = pipe.image_projection.null_image_embeds(number).detach()
        columns["caption only"] = sample(pipe, args, {"image_embeds": learned, "prompt": prompts})
    rows = {name: agreement(embed(pipe, shown), given) for name, shown in columns.items()}
    for name, row in rows.items():
        report(name, row)
    print(f"{number} images; by chance the own embedding is the nearest one in {1 / number:.3f}", flush=True)

    # Pairs of images that are far apart in the data, which is sorted by kind.
    pairs = [
        (i * number // args.num_pairs, (i * number // args.num_pairs + number // 2) % number)
        for i in range(args.num_pairs)
    ]
    weights = torch.linspace(0, 1, args.num_points).tolist()
    options = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
    paths, measures = [], []
    for index, ends in enumerate(pairs):
        (generator,) = seeded(args.seed + index, 1)
        ends = given[list(ends)]
        paths.append(pipe.interpolate(weights=weights, image_embeds=ends, generator=generator, **options).images)
        measures.append(is_monotone(similarities(embed(pipe, paths[-1]), ends)))
    interpolation = with_errors(**{name: mean_and_error([each[name] for each in measures]) for name in measures[0]})
    report("interpolation", interpolation)
    print(f"{len(pairs)} pairs, {args.num_points} points each", flush=True)

    shown = [number * i // NUM_SHOWN for i in range(min(NUM_SHOWN, number))]
    cells = ((name, [samples[i] for i in shown]) for name, samples in columns.items())
    grid_of_columns(cells, scale=1).save(args.output_dir / "unclip.png")
    points = zip([f"{weight:.2f}" for weight in weights], zip(*paths, strict=True), strict=True)
    grid_of_columns(points, scale=1).save(args.output_dir / "interpolation.png")
    content = {"rows": rows, "interpolation": interpolation, "pairs": measures}
    write_report(args.output_dir / "unclip.json", args, num_images=number, **content)


if __name__ == "__main__":
    main()
