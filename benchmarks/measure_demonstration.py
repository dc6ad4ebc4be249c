"""
Whether a text-conditional model of 64x64 emoji generates what a person asks for, in the eyes of a separate judge.

    measure_demonstration.py data --noto FILE --twemoji FILE --output_dir DATA
    accelerate launch training/train_clip.py --config training/configs/clip_emoji_64_judge.yaml --output_dir CLIP
    measure_demonstration.py check --data_dir DATA --clip CLIP --output_dir DIR
    measure_demonstration.py sample --model DIR --guidance_scales 2 3 4 --part choosing --output_dir DIR
    measure_demonstration.py sample --model DIR --guidance_scales 3 --output_dir DIR
    measure_demonstration.py measure --data_dir DATA --clip CLIP --samples FILE ... --output_dir DIR

The prompts are those of `data/prompts.json`, each with the names of the emoji that are right. For each sample a judge
ranks the names of all emoji without skin tones. The sample is right if one of the right names is among the first five.

There are two judges. The first (`features`) ranks a name by the most similar of its real images, of Noto and Twemoji,
in features of shape and colour whose differences within one emoji are whitened. The second, for comparison, is a small
CLIP. `check` gives their accuracy on images of Twemoji that they do not know.

`data` makes the judges' data from sets with the captions of `data/emoji_keywords.py`: emoji without skin tones and
with a medium one, which then has the captions of the emoji without. Every twelfth name lacks its image of Twemoji,
which is kept for `check`.

The first ten prompts are always reported one by one. The guidance scale is chosen on every second of the others
(`--part choosing`); the figures to report are those of the remaining prompts (`--part reporting`, the default).
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler
from measuring import load_judge, mean_and_error, pixels_of, quiet, seeded, spread, with_errors, write_report
from PIL import Image
from transformers import AutoTokenizer, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from diffusers_adm import ADMPipeline
from diffusers_adm.conditioning.text import max_prompt_length, tokenize
from diffusers_adm.evaluation import compare_image_sets
from diffusers_adm.training import decode_rgb, labelled_grid


NUM_CONCEPTS, SEEDS_PER_CONCEPT = 10, 10
TOP = 5
MEDIUM_TONE = ", medium skin tone"
EVERY_NTH_NAME = 12  # has no image of Twemoji in the judge's training
EMOJI = "data/noto-emoji-64"
CLASSIFIER = "spaces/model/base"
MEAN_COLOUR = 0.8  # about that of the sets, whose background is white
SHRINKAGE = 0.1
NUM_NEAREST = 10  # samples in each half of the figure of nearest images
FIGURE_SIZE, FIGURE_COLOURS = 48, 48  # pixels of an image in the figures, which have to stay below 80 kB


# 1. Prompts and names


def read_prompts(path: Path) -> dict[str, list[str]]:
    """The names of the right emoji by prompt, in the order of the file."""
    return json.loads(path.read_text(encoding="utf-8"))


def part_of(prompts: Sequence[str], part: str) -> list[int]:
    """Numbers of the prompts of a part: `choosing` or `reporting`; the concepts belong to the latter."""
    choosing = list(range(NUM_CONCEPTS, len(prompts), 2))
    return choosing if part == "choosing" else [i for i in range(len(prompts)) if i not in choosing]


def without_tone(text: str) -> str:
    return text.removesuffix(MEDIUM_TONE)


def has_other_tone(text: str) -> bool:
    return without_tone(text).endswith("skin tone")


def all_names(paths: Sequence[str]) -> list[str]:
    """Sorted names of the emoji without skin tones."""
    texts = {text for path in paths for text in pq.read_table(path, columns=["text"])["text"].to_pylist()}
    return sorted(text for text in texts if not text.endswith("skin tone"))


# 2. The judge's data


def make_data(args: argparse.Namespace) -> None:
    """Writes `train.parquet` and `unseen_images.parquet`."""
    sets = []
    for path in (args.noto, args.twemoji):
        data = datasets.Dataset.from_parquet(path)
        data = data.select([i for i, text in enumerate(data["text"][:]) if not has_other_tone(text)])
        data = data.select_columns(["image", "text", "label", "captions"])
        sets.append(
            data.map(
                lambda row: {
                    "text": without_tone(row["text"]),
                    "captions": [without_tone(caption) for caption in row["captions"]],
                }
            )
        )
    noto, twemoji = sets
    unseen = set(sorted(set(noto["text"][:]))[::EVERY_NTH_NAME])
    is_unseen = [text in unseen for text in twemoji["text"][:]]
    train = datasets.concatenate_datasets([noto, twemoji.select([i for i, x in enumerate(is_unseen) if not x])])
    args.output_dir.mkdir(parents=True, exist_ok=True)
    train.to_parquet(args.output_dir / "train.parquet")
    twemoji.select([i for i, x in enumerate(is_unseen) if x]).to_parquet(args.output_dir / "unseen_images.parquet")
    print(f"{len(train)} images to train the judge, {sum(is_unseen)} of {len(unseen)} names to check it")


def read_images(path: str, keep_tones: bool = False) -> tuple[list[Image.Image], list[str]]:
    """Images and names of a set; without those of skin tones, except for `keep_tones`."""
    data = datasets.Dataset.from_parquet(str(path))
    data = data.select([i for i, text in enumerate(data["text"][:]) if keep_tones or not text.endswith("skin tone")])
    return [decode_rgb(image) for image in data["image"]], data["text"][:]


# 3. The judge


def best_of_each(similarities: torch.Tensor, number_of_column: torch.Tensor, number: int) -> torch.Tensor:
    """
    The largest similarity of each row to the columns of each number: `(N, number)` from `(N, columns)`; -1 for numbers
    without a column.
    """
    index = number_of_column.expand(len(similarities), -1)
    return torch.full((len(similarities), number), -1.0).scatter_reduce(1, index, similarities, "amax")


def ranks(scores: torch.Tensor, right: Sequence[Sequence[int]]) -> torch.Tensor:
    """
    How many names have a higher score than the best of the right ones: 0 if a right one is the first.

    Args:
        scores (`torch.Tensor` of shape `(N, names)`): Scores of the names for each sample.
        right (sequence of sequences of `int`): Numbers of the right names of each sample.
    """
    best = torch.stack([row[list(numbers)].max() for row, numbers in zip(scores, right, strict=True)])
    return (scores > best[:, None]).sum(dim=1)


def shape_and_colour_features(pixels: torch.Tensor) -> torch.Tensor:
    """
    Colours in 8x8 cells, histograms of eight gradient directions in cells of two sizes (as in HOG, Dalal & Triggs
    2005), and a histogram of 64 colours, each of norm 1: `(N, 896)` from 8-bit images `(N, 3, 64, 64)`.
    """
    images = pixels.float() / 255
    brightness = images.mean(dim=1, keepdim=True)
    along_x = F.pad(brightness[..., 2:] - brightness[..., :-2], (1, 1, 0, 0))
    along_y = F.pad(brightness[..., 2:, :] - brightness[..., :-2, :], (0, 0, 1, 1))
    strength, angle = (along_x**2 + along_y**2).sqrt(), torch.atan2(along_y, along_x)
    directions = torch.cat([(angle - k * math.pi / 4).cos().clamp(min=0) ** 4 * strength for k in range(8)], dim=1)
    levels = pixels.long() // 64
    colours = F.one_hot((levels[:, 0] * 16 + levels[:, 1] * 4 + levels[:, 2]).flatten(1), 64).float().mean(dim=1)
    cells = F.avg_pool2d(images, 8) - MEAN_COLOUR
    parts = [cells, *(F.avg_pool2d(directions, size).sqrt() for size in (8, 16)), colours.sqrt()]
    return torch.cat([F.normalize(part.flatten(1), dim=1) for part in parts], dim=1)


def whiten_within(features: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """
    The matrix `(width, width)` that makes the covariance within the groups of equal numbers the identity (within-class
    covariance normalisation, Hatch et al. 2006): directions in which two images of one emoji differ hardly count.
    """
    deviations = []
    for number in numbers.unique():
        group = features[numbers == number]
        deviations.append(group - group.mean(dim=0))
    deviations = torch.cat(deviations).double()
    covariance = deviations.T @ deviations / len(deviations)
    covariance += SHRINKAGE * covariance.diagonal().mean() * torch.eye(len(covariance))
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.rsqrt()).float()


class FeatureJudge:
    """
    Scores the names of emoji by the most similar real image of each, in whitened features of shape and colour.

    Args:
        images (sequence of images), numbers (sequence of `int`): Real images, and the numbers of their names.
        num_names (`int`): Number of all names.
    """

    def __init__(self, images: Sequence[Image.Image], numbers: Sequence[int], num_names: int):
        self.numbers, self.num_names = torch.tensor(numbers), num_names
        features = self._features(images)
        self.mean, self.matrix = features.mean(dim=0), whiten_within(features, self.numbers)
        self.references = F.normalize((features - self.mean) @ self.matrix, dim=1)

    def _features(self, images: Sequence[Image.Image]) -> torch.Tensor:
        return torch.cat([shape_and_colour_features(part) for part in pixels_of(images).split(64)])

    def __call__(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Scores of all names, `(N, names)`."""
        embeds = F.normalize((self._features(images) - self.mean) @ self.matrix, dim=1)
        return best_of_each(embeds @ self.references.T, self.numbers, self.num_names)


class CLIPJudge:
    """
    Scores the names of emoji by the similarity of image and name in a CLIP.

    Args:
        folder (`str`): A CLIP of `training/train_clip.py`.
        names (sequence of `str`): All names.
    """

    def __init__(self, folder: str, names: Sequence[str]):
        self.clip = CLIPModel.from_pretrained(folder).eval()
        tokenizer, processor = AutoTokenizer.from_pretrained(folder), CLIPImageProcessorPil.from_pretrained(folder)
        self.mean, self.std = (torch.tensor(x)[:, None, None] for x in (processor.image_mean, processor.image_std))
        max_length = max_prompt_length(tokenizer, self.clip.text_model)
        ids, _ = tokenize(tokenizer, list(names), max_length=max_length, pad_to_max=False, warn=False)
        with torch.no_grad():
            embeds = [self.clip.get_text_features(input_ids=part).pooler_output for part in ids.split(256)]
        self.name_embeds = F.normalize(torch.cat(embeds), dim=1)

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Scores of all names, `(N, names)`."""
        size, embeds = (self.clip.config.vision_config.image_size,) * 2, []
        for part in pixels_of([image.resize(size, Image.Resampling.BICUBIC) for image in images]).split(64):
            pixel_values = (part.float() / 255 - self.mean) / self.std
            embeds.append(self.clip.get_image_features(pixel_values=pixel_values).pooler_output)
        return F.normalize(torch.cat(embeds), dim=1) @ self.name_embeds.T


def load_judges(args: argparse.Namespace) -> tuple[dict[str, Callable], dict[str, int]]:
    """The judges by name, and the numbers of the names of emoji."""
    names = all_names([f"{EMOJI}/train.parquet", f"{EMOJI}/test.parquet"])
    numbers = {name: number for number, name in enumerate(names)}
    images, own = read_images(args.data_dir / "train.parquet")
    judges: dict[str, Callable] = {"features": FeatureJudge(images, [numbers[name] for name in own], len(names))}
    if args.clip is not None:
        judges["CLIP"] = CLIPJudge(args.clip, names)
    return judges, numbers


def check(args: argparse.Namespace) -> None:
    """Prints and writes the accuracy of the judges on real images that they do not know."""
    judges, numbers = load_judges(args)
    images, names = read_images(args.data_dir / "unseen_images.parquet")
    # Real images that are right for a prompt, as if they were its samples.
    of_prompt = [(i, r) for r in read_prompts(args.prompts).values() for i, name in enumerate(names) if name in r]
    rows = {}
    for title, judge in judges.items():
        scores = judge(images)
        found = ranks(scores, [[numbers[name]] for name in names])
        of_prompts = ranks(scores[[i for i, _ in of_prompt]], [[numbers[name] for name in r] for _, r in of_prompt])
        rows[title] = with_errors(
            top_1=mean_and_error((found < 1).double()),
            top_5=mean_and_error((found < TOP).double()),
            prompts=mean_and_error((of_prompts < TOP).double()),
        )
        values = ", ".join(f"{name} {value:.3f}" for name, value in rows[title].items())
        print(f"{title:8} {values} ({len(images)} images, {len(of_prompt)} pairs of image and prompt)", flush=True)
    write_report(args.output_dir / "judge.json", args, rows=rows)


# 4. Samples


def make_samples(args: argparse.Namespace) -> None:
    """Writes unpicked samples with consecutive seeds, `guidance-SCALE-PART.npz`, for each guidance scale."""
    pipe = quiet(ADMPipeline.from_pretrained(args.model, variant=args.variant))
    if args.sampler == "DPM-Solver++":
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, variance_type=None)
    prompts = list(read_prompts(args.prompts))
    jobs = []  # number of the prompt, seed
    for number in part_of(prompts, args.part)[: args.num_prompts]:
        seeds = SEEDS_PER_CONCEPT if number < NUM_CONCEPTS else args.seeds_per_prompt
        jobs += [(number, seed) for seed in range(seeds)]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    options = {"num_inference_steps": args.num_inference_steps}
    options |= {"guidance_start": args.guidance_start, "guidance_end": args.guidance_end}
    for scale in args.guidance_scales:
        images, start = [], time.perf_counter()
        for first in range(0, len(jobs), args.batch_size):
            batch = jobs[first : first + args.batch_size]
            generators = [seeded(args.seed + 1000 * number + seed, 1)[0] for number, seed in batch]
            texts = [prompts[number] for number, _ in batch]
            images += pipe(texts, generator=generators, guidance_scale=scale, **options).images
        seconds = (time.perf_counter() - start) / len(jobs)
        settings = {**vars(args), "guidance_scale": scale, "seconds_per_image": seconds}
        path = args.output_dir / f"guidance-{scale:g}-{args.part}.npz"
        pixels = pixels_of(images).numpy()
        settings = json.dumps(settings, default=str)
        np.savez_compressed(path, images=pixels, numbers=np.array([n for n, _ in jobs]), settings=settings)
        print(f"{path}: {len(images)} images, {seconds:.2f} s each", flush=True)


# 5. Measures


def share_right(is_right: torch.Tensor, numbers: torch.Tensor) -> tuple[dict[int, float], float, float]:
    """Share of the right samples by the number of the prompt; its mean over the prompts, and the standard error."""
    shares = {int(number): is_right[numbers == number].double().mean().item() for number in numbers.unique()}
    values = list(shares.values())
    return shares, *(mean_and_error(values) if len(values) > 1 else (values[0], math.nan))


def nearest(images: torch.Tensor, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Distance of each image to the nearest of the others, as the root mean square of the differences of 8-bit values, and
    the number of that one: both `(N,)`, from `(N, 3, height, width)` and `(M, 3, height, width)`.
    """
    images, others = (each.flatten(1).double() for each in (images, others))
    distances, numbers = torch.cdist(images, others).min(dim=1)
    return distances / images.shape[1] ** 0.5, numbers


def matched_references(numbers: Sequence[int], right: Sequence[Sequence[str]], names: Sequence[str]) -> list[int]:
    """
    A real image for each sample that is right for its prompt, as its index in `names`: those of a prompt in turn. Names
    that are not there are left out; samples without any right image get none.
    """
    of_name: dict[str, int] = {name: index for index, name in enumerate(names)}
    used, chosen = dict.fromkeys(numbers, 0), []
    for number in numbers:
        candidates = [of_name[name] for name in right[number] if name in of_name]
        if candidates:
            chosen.append(candidates[used[number] * 7919 % len(candidates)])  # a prime: spread over long lists
            used[number] += 1
    return chosen


def as_samples(pixels: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """8-bit images of 64x64 pixels as items of `compare_image_sets` for a classifier of 32x32 pixels, in [-1, 1]."""
    return [{"images": image / 127.5 - 1} for image in F.avg_pool2d(pixels.float(), 2)]


def save_figure(
    images: Sequence[Image.Image], rows: int, row_labels: Sequence[str], col_labels: Sequence[str] | None, path: Path
) -> None:
    """Saves a grid of small images with few colours, which keep the file small."""
    images = [image.resize((FIGURE_SIZE, FIGURE_SIZE), Image.Resampling.LANCZOS) for image in images]
    grid = labelled_grid(images, rows, len(images) // rows, row_labels, col_labels)
    grid.convert("RGB").quantize(FIGURE_COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)


def measure(args: argparse.Namespace) -> None:
    """Prints and writes all measures of files of samples; figures of the last file with all concepts."""
    (judges, name_numbers), prompts = load_judges(args), read_prompts(args.prompts)
    words, right_names = list(prompts), list(prompts.values())
    network = load_judge(CLASSIFIER, "fp16")
    train_images, train_names = read_images(f"{EMOJI}/train.parquet", keep_tones=True)
    train = pixels_of(train_images)
    held_out, _ = read_images(f"{EMOJI}/test.parquet")
    held_out_distances, _ = nearest(pixels_of(held_out), train)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Any] = {}
    for path in args.samples:
        with np.load(path, allow_pickle=False) as file:
            pixels, numbers = torch.from_numpy(file["images"]), torch.from_numpy(file["numbers"])
            settings: Mapping[str, Any] = json.loads(str(file["settings"]))
        images = [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).numpy()]
        right = [[name_numbers[name] for name in right_names[number]] for number in numbers.tolist()]
        row: dict[str, Any] = {"settings": settings, "num_samples": len(images)}
        print(f"{path}: {len(images)} samples, guidance {settings['guidance_scale']:g}")
        for title, judge in judges.items():
            is_right = ranks(judge(images), right) < TOP
            shares, share, error = share_right(is_right, numbers)
            concepts = {
                words[i]: f"{int(is_right[numbers == i].sum())}/{int((numbers == i).sum())}"
                for i in range(NUM_CONCEPTS)
                if (numbers == i).any()
            }
            by_prompt = {words[i]: x for i, x in shares.items()}
            row[title] = {"share": share, "error": error, "concepts": concepts, "by_prompt": by_prompt}
            print(f"  {title:8} {share:.3f} ({error:.3f}) right; " + ", ".join(f"{k} {v}" for k, v in concepts.items()))

        # The prompts do not ask for all emoji alike, so each sample has its own reference.
        references = train[matched_references(numbers.tolist(), right_names, train_names)]
        comparison = compare_image_sets(
            network, *(as_samples(each) for each in (pixels, references)), progress_bar=False
        )
        row["comparison"] = comparison.to_dict()
        print(
            f"  Frechet distance {comparison.frechet_distance:.4f}, precision {comparison.precision:.3f}, "
            f"recall {comparison.recall:.3f} against {len(references)} images that are right for the prompts"
        )
        distances, indices = nearest(pixels, train)
        for name, each in (("distance", distances), ("held_out_distance", held_out_distances)):
            low, middle, high = each.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
            row[name] = {"10%": low, "median": middle, "90%": high}
            row[f"{name}_copies"] = share = (each < args.copy_distance).double().mean().item()
            print(
                f"  {name} to the nearest training image: {low:.1f}, {middle:.1f}, {high:.1f} "
                f"(10%, 50%, 90%); below {args.copy_distance:g}: {share:.3f}"
            )
        print(f"  {settings['seconds_per_image']:.2f} s an image", flush=True)
        rows[str(path)] = row

        if (numbers < NUM_CONCEPTS).sum() == NUM_CONCEPTS * SEEDS_PER_CONCEPT:
            grid = [images[i] for i in (numbers < NUM_CONCEPTS).nonzero()[:, 0].tolist()]
            columns = [str(seed) for seed in range(SEEDS_PER_CONCEPT)]
            figure = args.output_dir / "demonstration_prompts.png"
            save_figure(grid, NUM_CONCEPTS, words[:NUM_CONCEPTS], columns, figure)
        cells = []
        for half in (spread(len(images), NUM_NEAREST), distances.argsort()[:NUM_NEAREST].tolist()):
            cells += [images[i] for i in half] + [train_images[indices[i]] for i in half]
        labels = ["samples", "nearest", "closest of all", "nearest"]
        save_figure(cells, len(labels), labels, None, args.output_dir / "demonstration_nearest.png")
    write_report(args.output_dir / "demonstration.json", args, rows=rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    prompts = {"type": Path, "default": Path("data/prompts.json"), "help": "The prompts and what is right."}
    output_dir = {"type": Path, "required": True, "help": "Folder of the results."}
    data_dir = {"type": Path, "required": True, "help": "Folder that `data` has written."}

    command = commands.add_parser("data", help="make the data of the judge")
    command.add_argument("--noto", required=True, help="Noto's images, with the column captions: a Parquet file.")
    command.add_argument("--twemoji", required=True, help="Twemoji's images, with the column captions.")
    command.add_argument("--output_dir", **output_dir)

    command = commands.add_parser("check", help="accuracy of the judge")
    command.add_argument("--clip", help="CLIP as a second judge: a folder.")
    command.add_argument("--data_dir", **data_dir)
    command.add_argument("--prompts", **prompts)
    command.add_argument("--output_dir", **output_dir)

    command = commands.add_parser("sample", help="samples of a model")
    command.add_argument("--model", required=True, help="Pipeline: a folder or a Hub repository.")
    command.add_argument("--variant", help="Variant of the weights, e.g. fp16.")
    command.add_argument("--guidance_scales", type=float, nargs="+", default=[4.0])
    command.add_argument("--guidance_start", type=float, default=0.0, help="Share of the steps before guidance.")
    command.add_argument("--guidance_end", type=float, default=1.0, help="Share of the steps until its end.")
    command.add_argument("--num_inference_steps", type=int, default=25)
    command.add_argument("--sampler", choices=("DPM-Solver++", "own"), default="DPM-Solver++")
    command.add_argument("--part", choices=("choosing", "reporting"), default="reporting")
    command.add_argument("--num_prompts", type=int, help="The first prompts of the part only.")
    command.add_argument("--seeds_per_prompt", type=int, default=2, help="Samples per prompt; 10 of each concept.")
    command.add_argument("--batch_size", type=int, default=16)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--prompts", **prompts)
    command.add_argument("--output_dir", **output_dir)

    command = commands.add_parser("measure", help="measures of samples")
    command.add_argument("--clip", help="CLIP as a second judge: a folder.")
    command.add_argument("--data_dir", **data_dir)
    command.add_argument("--samples", type=Path, nargs="+", required=True, help="Files that `sample` has written.")
    command.add_argument("--copy_distance", type=float, default=20.0, help="Below it a sample is nearly a copy.")
    command.add_argument("--prompts", **prompts)
    command.add_argument("--output_dir", **output_dir)

    args = parser.parse_args(argv)
    {"data": make_data, "check": check, "sample": make_samples, "measure": measure}[args.command](args)


if __name__ == "__main__":
    main()
