"""
The variational bound of a diffusion model on images: prior, decoder, and one KL divergence per timestep.

Ho et al. 2020 (https://huggingface.co/papers/2006.11239, eqs. 5 and 13), Nichol & Dhariwal 2021
(https://huggingface.co/papers/2102.09672, eqs. 4 to 7). The network runs once per image and timestep.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from accelerate.utils import DistributedType

from ..commands.errors import CommandError
from ..commands.processes import gather_interleaved
from ..data.labels import UNLABELLED
from ..data.seeding import derive_seed
from ..models.input_checks import check_class_labels
from ..ops.finiteness import explain_not_finite, not_finite
from ..schedulers.gaussians import check_num_levels
from ..schedulers.scheduling_ddpm_learned_variance import (
    LearnedVarianceDDPMScheduler,
    mean_per_example,
    respaced_timesteps,
)
from .common import choose, make_bar


logger = logging.getLogger(__name__)

# How far a value may be from its level without a warning, in levels.
LEVEL_TOLERANCE = 0.01
# Plot: up to so many timesteps each has a marker; and the range of the logarithmic axes.
MAX_MARKERS = 60
SHOWN_RANGE = 1e6
# Kinds of distributed training in which each process holds only a part of the weights.
SHARDED_TYPES = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


@dataclass
class BitsPerDim:
    r"""
    The bound of N images for T timesteps. All tensors are on the CPU and, except `timesteps`, float64.

    Attributes:
        timesteps (`torch.LongTensor` of shape `(T,)`): Ascending numbers of the full chain; 0 is one step of noise.
        prior (`torch.Tensor` of shape `(N,)`): KL(q(x_T | x_0) || N(0, I)) in bits per dimension, which does not
            depend on the network.
        terms (`torch.Tensor` of shape `(N, T)`): Bits per dimension: at the first timestep the decoder's
            -log p(x_0 | x_1), elsewhere KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)).
        x0_mse (`torch.Tensor` of shape `(N, T)`): Mean squared error of the predicted x_0 in [-1, 1], clipped if the
            bound clips it.
        epsilon_mse (`torch.Tensor` of shape `(N, T)`): Mean squared error of the noise that this x_0 implies; 1 for a
            prediction of no noise.
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
        """The standard error of `bits_per_dim` over the images; NaN for a single one."""
        return _standard_error(self.total).item()

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {getattr(self, name).mean():.3f}" for name in ("prior", "decoder", "kl"))
        return (
            f"{self.bits_per_dim:.4f} \N{PLUS-MINUS SIGN} {self.standard_error:.4f} bits/dim ({parts}; "
            f"{len(self.total)} images, {len(self.timesteps)} timesteps)"
        )

    def to_dict(self) -> dict[str, Any]:
        """
        Means over the images and their standard errors (None for a single image), as plain values for `json`:
        `bits_per_dim`, its parts `prior`, `decoder` and `kl`, and `by_timestep`, with lists parallel to `timestep`.
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
        Plots the terms over t, their cumulative sum from t = 0, and both squared errors, as a PNG file at `path`.

        Bands are two standard errors. The horizontal axis is logarithmic, since most bits are at the smallest
        timesteps; it shows steps of noise, t + 1, to include t = 0.
        """
        # Of the `eval` extra. Not pyplot: it keeps global state and may choose a window backend.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(14, 4.2), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(str(self))
        errors = {"of $x_0$": self.x0_mse, "of the noise": self.epsilon_mse}
        panels: dict[str, tuple[str, dict[str, torch.Tensor]]] = {
            "Terms of the bound": ("bits/dim", {"KL": self.terms[:, 1:]}),
            "Bound, added up from t = 0": ("bits/dim", {"decoder and KL up to here": self.terms.cumsum(dim=1)}),
            "Squared errors of the prediction": ("mean squared error", errors),
        }
        steps = (self.timesteps + 1).numpy()
        marker = "." if len(steps) <= MAX_MARKERS else None
        left, middle, right = figure.subplots(1, 3)
        for axes, (heading, (unit, curves)) in zip((left, middle, right), panels.items(), strict=True):
            axes.set(title=heading, xlabel="steps of noise (t + 1)", ylabel=unit, xscale="log")
            axes.grid(True, which="major", alpha=0.3)
            for label, values in curves.items():
                mean, band = values.mean(dim=0).numpy(), 2 * _standard_error(values).numpy()
                x = steps[len(steps) - len(mean) :]  # of the KL, without the decoder
                if len(x) > 0:
                    (line,) = axes.plot(x, mean, linewidth=1.5, marker=marker, label=label)
                    axes.fill_between(x, mean - band, mean + band, alpha=0.25, color=line.get_color(), linewidth=0)
        left.plot(steps[:1], [self.decoder.mean().item()], "o", label="decoder")
        left.plot(steps[-1:], [self.prior.mean().item()], "s", label="prior")
        for axes, values in ((left, self.terms), (right, torch.cat([self.x0_mse, self.epsilon_mse], dim=1))):
            largest = values.mean(dim=0).max().item()
            if largest > 0 and (axes is not left or self.decoder.mean() >= 0):  # the logarithm of a density may be
                axes.set_yscale("log", nonpositive="clip")
                # The cosine schedule ends at 1e-9, which would compress the rest.
                axes.set_ylim(bottom=max(axes.get_ylim()[0], largest / SHOWN_RANGE))
        for axes in (left, middle, right):
            axes.legend(fontsize="small")
        figure.savefig(path, format="png")
        return str(path)


def _standard_error(values: torch.Tensor) -> torch.Tensor:
    """Standard error of the mean over the first dimension; NaN if that has one entry."""
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
    num_levels: int | None = 256,
    share: tuple[int, int] | None = None,
) -> BitsPerDim:
    r"""
    Evaluates the variational bound with one sample of x_t per image and timestep (Improved DDPM, eqs. 4 to 7).

    The noise depends only on `seed`, the position of the image in the data and the timestep. So batch size and number
    of processes change the result only by rounding, and two models are compared on the same noise. A term is computed
    in the dtype of the images, at least float32, and then converted to float64.

    Args:
        unet: Called as `unet(noisy_samples, timesteps)`, with `class_labels=` if it has classes; returns an output with
            `.sample`, a tuple, or a tensor. A module is in eval mode meanwhile.
        scheduler ([`LearnedVarianceDDPMScheduler`], or a scheduler of diffusers with a compatible config): The process.
        data: x_0: values on `num_levels` levels scaled to [-1, 1], for 8 bits `2 * k / 255 - 1`. Either a sequence of
            examples, such as an `ImageDataset` or a tensor `(N, channels, height, width)`; or an iterable of batches,
            such as a `DataLoader` (which must not be prepared: every process reads it completely). An example or batch
            is a tensor, a pair of images and labels, or a dict of `images` and `class_labels`. Labels are ignored by a
            network without classes; -1 is the null class, and so are missing labels.
        batch_size (`int`, defaults to 64): Noisy images per forward pass and process. Timesteps of one image share
            a pass, so a few images suffice to fill it.
        timestep_respacing (`str`, `int` or list of `int`, *optional*): For fewer steps; see [`respaced_timesteps`].
        clip_sample (`bool`, *optional*): Clip the predicted x_0; `None`: as in the scheduler's config.
        num_images (`int`, *optional*): Maximum number of images: a random choice (by `seed`) from a sequence, the first
            ones of an iterable.
        seed (`int`, defaults to 0): Random seed of the noise and of that choice.
        accelerator (`accelerate.Accelerator`, *optional*): Shares the images between its processes, and runs the
            network in its precision. Every process must call this function; each gets the whole result.
        progress_bar (`bool`, defaults to `True`): Show a progress bar in the main process.
        num_levels (`int`, *optional*, defaults to 256): Number of levels of the data: 256 for 8 bits, 65536 for 16.
            `None`: they are continuous, and the result is a *differential* bound, of -log2 of the density of the scaled
            values. It can be negative, depends on their unit (in that of values v times as large it is log2(v)
            higher), and cannot be compared with bits of levels.
        share (`tuple[int, int]`, *optional*): Instead of an `accelerator`: `(k, n)` evaluates every n-th image, from
            number k on, of a process that waits for no other.

    Returns:
        [`BitsPerDim`]: Per image, in the order of the data.

    Raises:
        ValueError: For images outside [-1, 1], labels that the network lacks or needs, and incompatible schedulers.
        RuntimeError: If a term is not finite.
    """
    # 1. check
    check_num_levels(num_levels)
    for name, value in (("batch_size", batch_size), ("num_images", num_images)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` is {value}; it must be at least 1.")
    if not isinstance(scheduler, LearnedVarianceDDPMScheduler):
        scheduler = learned_variance_scheduler(type(scheduler).__name__, scheduler.config)
    kept = list(range(scheduler.config.num_train_timesteps))
    if timestep_respacing is not None:
        kept = respaced_timesteps(len(kept), timestep_respacing)
    (rank, num_processes), autocast = share or (0, 1), contextlib.nullcontext
    device, network_dtype = _device_and_dtype(unet)
    if accelerator is not None:
        rank, num_processes = accelerator.process_index, accelerator.num_processes
        if accelerator.distributed_type in SHARDED_TYPES:
            raise ValueError(
                f"Accelerate is configured for {accelerator.distributed_type.value}, which splits the weights over "
                "processes: they would wait for each other in every forward pass. Use `multi_gpu`."
            )
        device, autocast = accelerator.device, accelerator.autocast
        # Processes make different numbers of forward passes, in which a DDP wrapper would synchronise them.
        unet = accelerator.unwrap_model(unet) if isinstance(unet, torch.nn.Module) else unet
    if num_processes > 1 and isinstance(data, (DataLoaderShard, DataLoaderDispatcher)):
        raise ValueError(
            "`data` is a prepared data loader, which repeats examples. Pass the loader before `accelerator.prepare`, "
            "or its dataset."
        )

    # 2. every image at every timestep
    timesteps = torch.tensor(kept).to(device)
    examples, num_local = _local_examples(data, num_images, seed, rank, num_processes)
    total = None if num_local is None else num_local * len(kept)
    bar = make_bar(total, "Bits per dimension", "forward", progress_bar and rank == 0, unit_scale=True)
    local = [torch.zeros(0, 1 + 2 * len(kept), dtype=torch.float64)]  # one row per image: prior, terms, x0_mse
    num_done, sum_of_bits = 0, 0.0
    with bar, _eval_mode(unet):
        while chunk := list(itertools.islice(examples, batch_size)):
            indices, images_of_chunk, labels = zip(*chunk, strict=True)
            images = torch.stack(images_of_chunk)
            _check_images(images, num_levels, first=indices[0], warn=rank == 0 and num_done == 0)
            class_labels = _class_labels(unet, labels)
            originals = images.to(device, torch.promote_types(images.dtype, torch.float32))
            if class_labels is not None:
                class_labels = class_labels.to(device)

            # Pairs of image and timestep: all images at one timestep, then at the next. The host does not wait for the
            # device until the chunk is done.
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
                terms.append(scheduler.variational_bound(model_output, x_0, x_t, t, num_levels=num_levels, **options))
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
    if accelerator is not None and num_processes > 1:
        gathered = gather_interleaved(gathered, accelerator)
    if len(gathered) == 0:
        raise ValueError("`data` holds no images. Pass at least one.")
    prior, terms, x0_mse = gathered.split([1, len(kept), len(kept)], dim=1)
    # x_t = sqrt(A) x_0 + sqrt(1 - A) e: a squared error in x_0 is one of A / (1 - A) times that in e.
    alphas_cumprod = scheduler.alphas_cumprod[kept]
    return BitsPerDim(
        timesteps=torch.tensor(kept),
        prior=prior[:, 0],
        terms=terms,
        x0_mse=x0_mse,
        epsilon_mse=x0_mse * (alphas_cumprod / (1 - alphas_cumprod)),
    )


def _device_and_dtype(model: Any) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a network's input; for a plain function, CPU and float32."""
    parameter = next(model.parameters(), torch.zeros(0)) if isinstance(model, torch.nn.Module) else torch.zeros(0)
    # A model of diffusers may store its weights in another dtype than it computes in.
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


def learned_variance_scheduler(
    class_name: str | None, config: Mapping[str, Any], **changes: Any
) -> LearnedVarianceDDPMScheduler:
    """The process that a scheduler of this class and config describes, with changes of the config."""
    if class_name not in LearnedVarianceDDPMScheduler._compatibles:
        raise ValueError(
            f"The scheduler is a {class_name}, for which the bound is not implemented. It must be a "
            "`LearnedVarianceDDPMScheduler`, a `DDPMScheduler`, or one with such a config."
        )
    return LearnedVarianceDDPMScheduler.from_config(config, **changes)


def _local_examples(
    data: Any, num_images: int | None, seed: int, rank: int, num_processes: int
) -> tuple[Iterator[tuple[int, torch.Tensor, Any]], int | None]:
    """The examples of this process: position in the data, image, label or None; and their number, if it is known."""
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        batches = (_images_and_labels(batch, ndim=4) for batch in data)
        rows = (
            (image, None if labels is None else labels[row])
            for images, labels in batches
            for row, image in enumerate(images)
        )
        numbered = ((index, *row) for index, row in enumerate(rows))
        return itertools.islice(numbered, rank, num_images, num_processes), None
    mine = choose(len(data), num_images, seed)[rank::num_processes]
    return ((index, *_images_and_labels(data[index], ndim=3)) for index in mine), len(mine)


def _images_and_labels(item: Any, ndim: int) -> tuple[torch.Tensor, Any]:
    if isinstance(item, Mapping):
        images, labels = item["images"], item.get("class_labels")
    elif isinstance(item, (tuple, list)):
        images, labels = item if len(item) > 1 else (*item, None)
    else:
        images, labels = item, None
    if not torch.is_tensor(images) or images.ndim != ndim:
        found = f"shape {tuple(images.shape)}" if torch.is_tensor(images) else f"type {type(images).__name__}"
        raise ValueError(
            f"The images in an item of `data` have {found}. A sequence must hold tensors (channels, height, width); an "
            "iterable, such as a `DataLoader`, tensors (batch_size, channels, height, width)."
        )
    return images, labels


def _check_images(images: torch.Tensor, num_levels: int | None, first: int, warn: bool) -> None:
    values = "values" if num_levels is None else "8-bit values" if num_levels == 256 else f"{num_levels} levels"
    if not (images.abs() <= 1).all():  # also for NaN
        low, high = images.min().item(), images.max().item()
        raise ValueError(
            f"Images from number {first} on hold values from {low:.6g} to {high:.6g}, but the bound is defined for "
            f"{values} scaled to [-1, 1]. Pass `2 * (images - low) / (high - low) - 1` for the range low to high: "
            "`images / 127.5 - 1` for 0..255, `2 * images - 1` for [0, 1]."
        )
    if num_levels is None or not warn:
        return
    levels = (images.double() + 1) * ((num_levels - 1) / 2)
    if (levels - levels.round()).abs().max() > LEVEL_TOLERANCE:
        logger.warning(
            f"The images are not on the {num_levels} levels 2 * k / {num_levels - 1} - 1. The bound is that of "
            f"{values}; for other values it is not comparable."
        )


def _class_labels(unet: Any, labels: Sequence[Any]) -> torch.Tensor | None:
    """One label per image, -1 replaced by the null class; None for a network without classes."""
    config = getattr(unet, "config", {})
    num_classes, null_class_id = config.get("num_class_embeds"), config.get("null_class_id")
    if config and num_classes is None and config.get("class_embed_type") is None:
        return None
    if any(label is None for label in labels):
        if not config:  # a function
            return None
        if null_class_id is None:
            raise ValueError(
                "The network is class-conditional without a null class (`null_class_id`), but the data have no labels. "
                "Pass pairs of images and labels, or dicts with `class_labels`."
            )
        return torch.full((len(labels),), null_class_id)
    class_labels = torch.stack([torch.as_tensor(label) for label in labels]).cpu()
    if null_class_id is not None and class_labels.ndim == 1:
        class_labels = class_labels.masked_fill(class_labels == UNLABELLED, null_class_id)
    if num_classes is not None and config.get("class_embed_type") is None:
        check_class_labels(config, len(labels), class_labels)  # here, since the network checks them only on the CPU
    return class_labels


def _draw_noise(
    shape: Sequence[int], seed: int, places: Sequence[tuple[int, int]], device: torch.device
) -> torch.Tensor:
    """Standard normal noise, float32, that depends on (position of the image, timestep) and not on the batch."""
    # On the CPU, to be the same for every device. Pinned memory is copied without waiting for the device.
    noise = torch.empty(len(places), *shape, pin_memory=device.type == "cuda")
    generator = torch.Generator()
    for row, (index, timestep) in zip(noise, places, strict=True):
        generator.manual_seed(derive_seed(seed, "bits per dimension", index, timestep))
        row.normal_(generator=generator)
    return noise.to(device, non_blocking=True)
