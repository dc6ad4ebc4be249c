"""
The variational bound of a diffusion model on images: prior, decoder, and one KL divergence a timestep.

Ho et al. 2020 (https://huggingface.co/papers/2006.11239, eqs. 5 and 13), Nichol & Dhariwal 2021
(https://huggingface.co/papers/2102.09672, eqs. 4 to 7). The network runs once for every image and every timestep.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from accelerate.utils import DistributedType
from tqdm.auto import tqdm

from ...commands.errors import CommandError
from ...data.labels import UNLABELLED
from ...data.seeding import derive_seed
from ...ops.finiteness import explain_not_finite, not_finite
from ...schedulers.scheduling_ddpm_learned_variance import (
    LearnedVarianceDDPMScheduler,
    mean_per_example,
    respaced_timesteps,
)


logger = logging.getLogger(__name__)

# How far, in steps of 1/255 of the range, a value may lie from its 8-bit level before it counts as something else.
LEVEL_TOLERANCE = 0.01
# Of the plot: timesteps up to which each gets a marker, and how far down the logarithmic axes reach.
MAX_MARKERS = 60
SHOWN_RANGE = 1e6
# Kinds of Accelerate's processes that hold a part of the weights each.
SHARDED_TYPES = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


@dataclass
class BitsPerDim:
    r"""
    The bound of N images under a chain of T timesteps. All tensors are on the CPU and, but for `timesteps`, float64.

    Attributes:
        timesteps (`torch.LongTensor` of shape `(T,)`): Ascending numbers of the full chain; 0 is one step of noise.
        prior (`torch.Tensor` of shape `(N,)`): KL(q(x_T | x_0) || N(0, I)) in bits per dimension; no network
            changes it.
        terms (`torch.Tensor` of shape `(N, T)`): Bits per dimension: at the first timestep the decoder's
            -log p(x_0 | x_1), elsewhere KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)).
        x0_mse (`torch.Tensor` of shape `(N, T)`): Mean squared error of the predicted x_0, clipped where the bound
            clips it; the range of x_0 is [-1, 1].
        epsilon_mse (`torch.Tensor` of shape `(N, T)`): Mean squared error of the noise that this x_0 implies; a
            prediction of no noise at all scores 1.
    """

    timesteps: torch.Tensor
    prior: torch.Tensor
    terms: torch.Tensor
    x0_mse: torch.Tensor
    epsilon_mse: torch.Tensor

    @property
    def total(self) -> torch.Tensor:
        """Prior plus all terms, `(N,)`: an upper bound of the bits per dimension of each image."""
        return self.prior + self.terms.sum(dim=1)

    @property
    def decoder(self) -> torch.Tensor:
        """The term of the first timestep, `(N,)`."""
        return self.terms[:, 0]

    @property
    def kl(self) -> torch.Tensor:
        """The sum of the terms of all other timesteps, `(N,)`."""
        return self.terms[:, 1:].sum(dim=1)

    @property
    def bits_per_dim(self) -> float:
        """The mean of `total`."""
        return self.total.mean().item()

    @property
    def standard_error(self) -> float:
        """The standard error of `bits_per_dim`, from the spread over the images; NaN for a single one."""
        return _standard_error(self.total).item()

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {getattr(self, name).mean():.3f}" for name in ("prior", "decoder", "kl"))
        return (
            f"{self.bits_per_dim:.4f} \N{PLUS-MINUS SIGN} {self.standard_error:.4f} bits/dim ({parts}; "
            f"{len(self.total)} images, {len(self.timesteps)} timesteps)"
        )

    def to_dict(self) -> dict[str, Any]:
        """
        Means over the images and their standard errors, in plain numbers and lists that `json` takes: `bits_per_dim`,
        the parts `prior`, `decoder` and `kl`, and `by_timestep`, whose lists go along `timestep`. A standard error is
        None where there is one image only.
        """
        values: dict[str, Any] = {"num_images": len(self.total), "num_timesteps": len(self.timesteps)}
        parts = {"bits_per_dim": self.total, "prior": self.prior, "decoder": self.decoder, "kl": self.kl}
        for name, part in parts.items():
            values[name] = part.mean().item()
            values[f"{name}_standard_error"] = _or_none(_standard_error(part).item())
        by_timestep = {"timestep": self.timesteps.tolist()}
        for name in ("terms", "x0_mse", "epsilon_mse"):
            by_timestep[name] = getattr(self, name).mean(dim=0).tolist()
            errors = _standard_error(getattr(self, name)).tolist()
            by_timestep[f"{name}_standard_error"] = [_or_none(error) for error in errors]
        return values | {"by_timestep": by_timestep}

    def plot(self, path: str | os.PathLike) -> str:
        """
        Draws the terms over t, the bound as it adds up from t = 0, and both squared errors, as a PNG at `path`.

        Bands are two standard errors. The horizontal axis is logarithmic, since most bits lie at the smallest
        timesteps; it counts steps of noise, t + 1, because 0 has no place on it.
        """
        # matplotlib comes with the `train` extra. Figure and canvas are used directly: pyplot keeps global state, and
        # would choose a window backend where there is a display.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(14, 4.2), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(str(self))
        left, middle, right = figure.subplots(1, 3)
        for axes, heading, unit in (
            (left, "Terms of the bound", "bits/dim"),
            (middle, "Bound, added up from t = 0", "bits/dim"),
            (right, "Squared errors of the prediction", "mean squared error"),
        ):
            axes.set_title(heading)
            axes.set_xlabel("steps of noise (t + 1)")
            axes.set_ylabel(unit)
            axes.set_xscale("log")
            axes.grid(True, which="major", alpha=0.3)

        steps = (self.timesteps + 1).numpy()
        for axes, label, values, first in (
            (left, "KL", self.terms[:, 1:], 1),
            (middle, "decoder and KL up to here", self.terms.cumsum(dim=1), 0),
            (right, "of $x_0$", self.x0_mse, 0),
            (right, "of the noise", self.epsilon_mse, 0),
        ):
            if len(steps) == first:  # one timestep: a decoder, and no KL
                continue
            mean, band = values.mean(dim=0).numpy(), 2 * _standard_error(values).numpy()
            marker = "." if len(steps) <= MAX_MARKERS else None
            (line,) = axes.plot(steps[first:], mean, linewidth=1.5, marker=marker, label=label)
            axes.fill_between(steps[first:], mean - band, mean + band, alpha=0.25, color=line.get_color(), linewidth=0)
        left.plot(steps[:1], [self.decoder.mean().item()], "o", label="decoder")
        left.plot(steps[-1:], [self.prior.mean().item()], "s", label="prior")
        for axes, values in ((left, self.terms), (right, torch.cat([self.x0_mse, self.epsilon_mse], dim=1))):
            largest = values.mean(dim=0).max().item()
            if largest > 0:
                axes.set_yscale("log", nonpositive="clip")
                # Of what is smaller, only that it is small can be seen; the cosine schedule ends at 1e-9.
                axes.set_ylim(bottom=max(axes.get_ylim()[0], largest / SHOWN_RANGE))
        for axes in (left, middle, right):
            axes.legend(fontsize="small")
        figure.savefig(path, format="png")
        return str(path)


def _standard_error(values: torch.Tensor) -> torch.Tensor:
    """Of the mean over the first dimension; NaN where that has one entry."""
    if len(values) < 2:
        return torch.full_like(values.mean(dim=0), math.nan)
    return values.std(dim=0) / math.sqrt(len(values))


def _or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


@torch.no_grad()
def bits_per_dim(
    unet: Callable[..., Any],
    scheduler: Any,
    data: torch.utils.data.Dataset | Iterable[Any],
    *,
    batch_size: int = 64,
    timestep_respacing: str | int | Sequence[int] | None = None,
    clip_sample: bool | None = None,
    num_images: int | None = None,
    seed: int = 0,
    accelerator: Accelerator | None = None,
    progress_bar: bool = True,
) -> BitsPerDim:
    r"""
    Evaluates the whole variational bound, one sample of x_t for each image and timestep (Improved DDPM, eqs. 4 to 7).

    The noise depends on `seed`, on the image's position in the data and on the timestep, and on nothing else. So batch
    size and number of processes change the result by rounding only, and two models, or two chains, are compared on the
    same noise. A term is computed in the images' dtype, at least float32; from there on, all is float64.

    Args:
        unet: Called as `unet(noisy_samples, timesteps)`, or with `class_labels=` where it has classes; returns an
            output with `.sample`, a tuple, or a tensor. A module is put into eval mode meanwhile.
        scheduler ([`LearnedVarianceDDPMScheduler`], or a scheduler of diffusers whose config it takes): The full chain.
        data: x_0: 8-bit values scaled to [-1, 1], `2 * k / 255 - 1`. Something with a length and an index, such as an
            `ImageDataset` or a tensor `(N, channels, height, width)`, whose items are one example each; or an iterable
            of batches, such as a `DataLoader` (which every process reads whole, so that it must not be prepared). An
            example or batch is a tensor, a pair of images and labels, or a dict of `images` and `class_labels`. Labels
            are not used for a network without classes; -1 stands for its null class, and so does having no labels.
        batch_size (`int`, defaults to 64): Noisy images per forward pass and process. Timesteps of one image share
            a pass, so that a few images suffice to fill it.
        timestep_respacing (`str`, `int` or list of `int`, *optional*): Of a shorter chain; see [`respaced_timesteps`].
        clip_sample (`bool`, *optional*): Clip the predicted x_0; `None`: as the scheduler's config says.
        num_images (`int`, *optional*): Evaluate this many at most: a random choice (by `seed`) of data with an index,
            the first ones of an iterable.
        seed (`int`, defaults to 0): Of the noise and of that choice.
        accelerator (`accelerate.Accelerator`, *optional*): Shares the images between its processes, runs the network in
            its precision. Every process must call; each gets the whole result.
        progress_bar (`bool`, defaults to `True`): Show one, on the main process.

    Returns:
        [`BitsPerDim`]: Per image, in the order of the data.

    Raises:
        ValueError: For images outside [-1, 1], a class-conditional network without labels or null class, labels out of
            range, no images, an option out of range, or a network whose output does not fit the scheduler.
        RuntimeError: If a term is not finite.
    """
    # 1. check
    for name, value in (("batch_size", batch_size), ("num_images", num_images)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` is {value}; it must be at least 1.")
    scheduler = _learned_variance_scheduler(scheduler)
    num_train_timesteps = scheduler.config.num_train_timesteps
    if timestep_respacing is None:
        kept = list(range(num_train_timesteps))
    else:
        kept = respaced_timesteps(num_train_timesteps, timestep_respacing)
    rank, num_processes = 0, 1
    if accelerator is not None:
        rank, num_processes = accelerator.process_index, accelerator.num_processes
        if accelerator.distributed_type in SHARDED_TYPES:
            raise ValueError(
                f"Accelerate is configured for {accelerator.distributed_type.value}, which splits the weights over "
                "processes, so that they would wait for each other at every pass. Use `multi_gpu`."
            )
        # Processes make different numbers of passes, at which a DDP wrapper would have them wait for each other.
        unet = accelerator.unwrap_model(unet) if isinstance(unet, torch.nn.Module) else unet
    if num_processes > 1 and isinstance(data, (DataLoaderShard, DataLoaderDispatcher)):
        raise ValueError(
            "`data` is a prepared data loader, which repeats examples to give every process as many. Pass the loader "
            "as it was before `accelerator.prepare`, or its dataset."
        )
    device, network_dtype = _device_and_dtype(unet)
    autocast = contextlib.nullcontext
    if accelerator is not None:
        device, autocast = accelerator.device, accelerator.autocast

    # 2. every image at every timestep
    timesteps = torch.tensor(kept).to(device)
    examples, num_local = _local_examples(data, num_images, seed, rank, num_processes)
    bar = tqdm(
        total=num_local * len(kept) if num_local is not None else None,
        desc="Bits per dimension",
        unit="forward",
        unit_scale=True,
        disable=not progress_bar or rank > 0,
        mininterval=0.1 if sys.stderr.isatty() else 10,  # seconds; a log file keeps every update
    )
    local = [torch.zeros(0, 1 + 2 * len(kept), dtype=torch.float64)]  # one row an image: prior, terms, x0_mse
    num_done, sum_of_bits = 0, 0.0
    with bar, _eval_mode(unet):
        while chunk := list(itertools.islice(examples, batch_size)):
            indices, images_of_chunk, labels = zip(*chunk, strict=True)
            images = torch.stack(images_of_chunk)
            _check_images(images, first=indices[0], warn=rank == 0 and num_done == 0)
            class_labels = _class_labels(unet, labels)
            originals = images.to(device, torch.promote_types(images.dtype, torch.float32))
            if class_labels is not None:
                class_labels = class_labels.to(device)

            # Pairs of image and timestep, image by image at one timestep and then at the next. The host does not wait
            # for the device until the chunk is done.
            terms, x0_mse = [], []
            for start in range(0, len(chunk) * len(kept), batch_size):
                stop = min(start + batch_size, len(chunk) * len(kept))
                pairs = torch.arange(start, stop, device=device)
                rows, columns = pairs % len(chunk), pairs // len(chunk)
                t, x_0 = timesteps.index_select(0, columns), originals.index_select(0, rows)
                places = [(indices[pair % len(chunk)], kept[pair // len(chunk)]) for pair in range(start, stop)]
                noise = _draw_noise(images.shape[1:], seed, places, device)
                x_t = scheduler.add_noise(x_0, noise, t)
                kwargs = {} if class_labels is None else {"class_labels": class_labels.index_select(0, rows)}
                with autocast():
                    model_output = unet(x_t.to(network_dtype), t, **kwargs)
                if not torch.is_tensor(model_output):
                    model_output = model_output[0]  # a tuple, or an output class, whose first entry is `.sample`
                model_output = model_output.to(x_t.dtype)
                options = {"clip_sample": clip_sample, "timestep_respacing": timestep_respacing}
                terms.append(scheduler.variational_bound(model_output, x_0, x_t, t, **options))
                _, _, pred_x_0 = scheduler.predicted_distribution(model_output, t, x_t, **options)
                x0_mse.append(mean_per_example((pred_x_0 - x_0) ** 2))
                bar.update(stop - start)
            by_image = [torch.cat(values).reshape(len(kept), len(chunk)).T for values in (terms, x0_mse)]
            prior = scheduler.prior_bits_per_dim(originals, timestep_respacing=timestep_respacing)
            local.append(torch.cat([prior[:, None], *by_image], dim=1).cpu().double())
            bad = not_finite(local[-1])
            if bad:
                with autocast():
                    reason = explain_not_finite({"unet": unet} if isinstance(unet, torch.nn.Module) else {})
                raise CommandError(f"Terms of the bound of image {indices[bad[0]]} are not finite. {reason}", 1)
            num_done += len(chunk)
            sum_of_bits += local[-1][:, : 1 + len(kept)].sum().item()
            bar.set_postfix({"bits/dim": f"{sum_of_bits / num_done:.3f}"})  # so far, on this process

    # 3. the images of all processes, in the order of the data
    gathered = torch.cat(local)
    if num_processes > 1:
        gathered = _gather_interleaved(gathered, accelerator)
    if len(gathered) == 0:
        raise ValueError("`data` holds no images. Pass at least one.")
    prior, terms, x0_mse = gathered.split([1, len(kept), len(kept)], dim=1)
    # x_t = sqrt(A) x_0 + sqrt(1 - A) e makes an error in x_0 one in e of A / (1 - A) times its square.
    alphas_cumprod = scheduler.alphas_cumprod[kept]
    return BitsPerDim(
        timesteps=torch.tensor(kept),
        prior=prior[:, 0],
        terms=terms,
        x0_mse=x0_mse,
        epsilon_mse=x0_mse * (alphas_cumprod / (1 - alphas_cumprod)),
    )


def _device_and_dtype(model: Any) -> tuple[torch.device, torch.dtype]:
    """Of what the network takes; a plain function is taken for one on the CPU in float32."""
    parameter = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
    if parameter is None:
        parameter = torch.zeros(0)
    # Of a model of diffusers, whose weights may be stored in another dtype than they are used in.
    return getattr(model, "device", parameter.device), getattr(model, "dtype", parameter.dtype)


@contextlib.contextmanager
def _eval_mode(model: Any) -> Iterator[None]:
    training = getattr(model, "training", False)
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


def _learned_variance_scheduler(scheduler: Any) -> LearnedVarianceDDPMScheduler:
    if isinstance(scheduler, LearnedVarianceDDPMScheduler):
        return scheduler
    known = LearnedVarianceDDPMScheduler._compatibles
    if type(scheduler).__name__ not in known:
        raise ValueError(
            f"`scheduler` is a {type(scheduler).__name__}, whose process has no such bound here. Pass a "
            "`LearnedVarianceDDPMScheduler` or a `DDPMScheduler`."
        )
    return LearnedVarianceDDPMScheduler.from_config(scheduler.config)


def _local_examples(
    data: Any, num_images: int | None, seed: int, rank: int, num_processes: int
) -> tuple[Iterator[tuple[int, torch.Tensor, Any]], int | None]:
    """
    Every `num_processes`-th example, from number `rank` on: position in the data, image, label or None. And how many
    these are, None where only the end of an iterable tells.
    """
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        batches = (_images_and_labels(batch, ndim=4) for batch in data)
        rows = (
            (image, None if labels is None else labels[row])
            for images, labels in batches
            for row, image in enumerate(images)
        )
        numbered = ((index, *row) for index, row in enumerate(rows))
        return itertools.islice(numbered, rank, num_images, num_processes), None
    chosen: Sequence[int] = range(len(data))
    if num_images is not None and num_images < len(data):
        # Not the first ones: data in folders are sorted by class.
        chosen = sorted(random.Random(derive_seed(seed, "num_images")).sample(chosen, num_images))
    mine = chosen[rank::num_processes]
    return ((index, *_images_and_labels(data[index], ndim=3)) for index in mine), len(mine)


def _images_and_labels(item: Any, ndim: int) -> tuple[torch.Tensor, Any]:
    if isinstance(item, Mapping):
        if "images" not in item:
            raise ValueError(
                f"An item of `data` has the keys {', '.join(map(str, item))}, but no `images`. Name it so."
            )
        images, labels = item["images"], item.get("class_labels")
    elif isinstance(item, (tuple, list)):
        if not 1 <= len(item) <= 2:
            raise ValueError(f"An item of `data` has {len(item)} entries. Pass images, or images and labels.")
        images, labels = item if len(item) == 2 else (item[0], None)
    else:
        images, labels = item, None
    if not torch.is_tensor(images) or images.ndim != ndim:
        found = f"shape {tuple(images.shape)}" if torch.is_tensor(images) else f"type {type(images).__name__}"
        raise ValueError(
            f"The images in an item of `data` have {found}. Data with a length and an index hold tensors (channels, "
            "height, width); an iterable, such as a `DataLoader`, gives tensors (batch_size, channels, height, width)."
        )
    return images, labels


def _check_images(images: torch.Tensor, first: int, warn: bool) -> None:
    if not (images.abs() <= 1).all():  # NaN fails, too
        low, high = images.min().item(), images.max().item()
        raise ValueError(
            f"Images from number {first} on hold values from {low:.6g} to {high:.6g}, but the bound is that of 8-bit "
            "values scaled to [-1, 1]. Pass `images / 127.5 - 1` for 0..255, `2 * images - 1` for [0, 1]."
        )
    levels = (images.double() + 1) * 127.5
    if warn and (levels - levels.round()).abs().max() > LEVEL_TOLERANCE:
        logger.warning(
            "The images do not lie on the 256 levels 2 * k / 255 - 1. The bound counts the bits of 8-bit values; of "
            "others it says nothing comparable."
        )


def _class_labels(unet: Any, labels: Sequence[Any]) -> torch.Tensor | None:
    """One label for each image, as the network takes them; None for a network without classes."""
    config = getattr(unet, "config", {})
    num_classes, null_class_id = config.get("num_class_embeds"), config.get("null_class_id")
    if config and num_classes is None and config.get("class_embed_type") is None:
        return None
    if any(label is None for label in labels):
        if not config:  # a function: it knows what it was made from
            return None
        if null_class_id is None:
            raise ValueError(
                "The network is class-conditional and has no null class (`null_class_id` in its config), but the data "
                "have no labels. Pass pairs of images and labels, or dicts with `class_labels`."
            )
        return torch.full((len(labels),), null_class_id)
    class_labels = torch.stack([torch.as_tensor(label) for label in labels]).cpu()
    if null_class_id is not None and class_labels.ndim == 1:
        class_labels = class_labels.masked_fill(class_labels == UNLABELLED, null_class_id)
    if num_classes is not None and config.get("class_embed_type") is None:
        low, high = int(class_labels.min()), int(class_labels.max())
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"The class labels reach from {low} to {high}; the network has the classes 0 to {num_classes - 1}"
                + (" and no null class for -1." if null_class_id is None else ", and -1 for its null class.")
            )
    return class_labels


def _draw_noise(
    shape: Sequence[int], seed: int, places: Sequence[tuple[int, int]], device: torch.device
) -> torch.Tensor:
    """Standard normal noise, float32, for each (position of the image, timestep): the same in whatever batch."""
    # On the CPU, so that it is the same for every device, too. Pinned memory is copied without waiting for the device.
    noise = torch.empty(len(places), *shape, pin_memory=device.type == "cuda")
    generator = torch.Generator()
    for row, (index, timestep) in zip(noise, places, strict=True):
        generator.manual_seed(derive_seed(seed, "bits per dimension", index, timestep))
        row.normal_(generator=generator)
    return noise.to(device, non_blocking=True)


def _gather_interleaved(rows: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """
    The rows of all processes, on the CPU. Row k of process p is row `k * num_processes + p` of the result; a process
    may hold one row more than those after it. Collective: every process calls it, and gets the same.
    """
    counts = accelerator.gather(torch.tensor([len(rows)], device=accelerator.device)).tolist()
    padded = torch.cat([rows, rows.new_zeros(max(counts) - len(rows), rows.shape[1])])
    gathered = accelerator.gather(padded.to(accelerator.device)).cpu()
    return gathered.reshape(len(counts), max(counts), -1).transpose(0, 1).flatten(0, 1)[: sum(counts)]
