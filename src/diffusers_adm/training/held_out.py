"""
Measures of a diffusion model on held-out images, while it is trained: the loss, bits per dimension, Frechet distance.

The loss is that of training, at fixed timesteps with fixed noise: two validations differ by the weights only. Every
process measures its share, in passes that wait for no other process; then the results are gathered.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from diffusers import DiffusionPipeline
from torch.utils.data import DataLoader, Dataset

from ..conditioning.condition import Condition, UNetInputs, merge
from ..conditioning.text import pads_to_max
from ..data.captions import CaptionEmbeddings, CaptionTokens
from ..data.checks import check_images
from ..data.columns import load_image_dataset
from ..data.images import ImageDataset
from ..data.labels import match_classes, renumber_labels
from ..data.latents import check_latents, find_stored_latents, load_latents
from ..data.seeding import derive_seed
from ..measures.bound import bits_per_dim
from ..measures.common import choose
from ..ops.frechet import GaussianStatistics, frechet_distance
from .disk import write_whole
from .interruption import keep_to_parent
from .losses import training_losses
from .metrics import NUM_QUARTERS
from .perceptual import features_of, load_feature_classifier
from .validation import Example, example_at, generate_samples


if TYPE_CHECKING:
    from .diffusion import Diffusion
    from .run import TrainingRun

MEASURES_NAME = "held_out.json"
# Timesteps at which the loss of each image is measured, one in each of as many equal parts of the schedule. Together,
# the images have evenly spaced ones.
TIMESTEPS_PER_IMAGE = 4
# Terms of the loss, as in the rows of training.
TERMS = ("loss", "mse", "vb")


# 1. Data


def load_held_out(
    diffusion: Diffusion,
    masks: bool = False,
    dataset_class: Callable[..., ImageDataset] = ImageDataset,
    pair: Callable[..., Any] | None = None,
) -> ImageDataset | None:
    """
    The held-out images of the data arguments, as the training data but cropped at the centre, with the same masks and
    captions in all validations; `None` without any. Raises a `ValueError` for images of other classes or of another
    format, and for latents in place of images or the other way round.

    Args:
        diffusion (`Diffusion`): From `load_diffusion`.
        masks, dataset_class: As for `Diffusion.datasets`.
        pair (callable, *optional*): Joins the images with those of another source, called as `pair(images, source)`
            with the arguments that loaded them.
    """
    data_args, text_args, seed = diffusion.args.data, diffusion.args.text, diffusion.args.training.seed
    source = data_args.validation_source()
    if source is None:
        return None
    if diffusion.num_classes is None:
        source["label_column"] = None
    columns = {"caption_column": text_args.caption_column, **diffusion.columns}
    folder, stored = source["train_data_dir"], find_stored_latents(source["train_data_dir"])
    is_stored, has_name = diffusion.stored_latents is not None, data_args.validation_data_dir is not None
    if is_stored != (stored is not None) or (is_stored and not has_name):
        raise ValueError(
            "The run is trained on stored latents, so the held-out ones must be stored, too. Name their folder with "
            "`--validation_data_dir`."
            if is_stored
            else f"`validation_data_dir` {folder!r} holds latents, but the run is trained on images. Name a folder of "
            "images."
        )
    allow_unlabelled = source["label_column"] is None or diffusion.null_class_id is not None
    if stored is not None:
        known = diffusion.stored_latents
        if (stored.autoencoder, stored.shape) != (known.autoencoder, known.shape):
            raise ValueError(
                f"The latents of `validation_data_dir` {folder!r} were made by another autoencoder, or are of another "
                "size, than those of `train_data_dir`. Encode the held-out images with the same one."
            )
        images, id2label = load_latents(
            folder,
            stored,
            source["label_column"],
            **columns,
            cache_dir=data_args.cache_dir,
            max_train_samples=data_args.max_validation_samples,
            seed=seed,
        )
    else:
        images, id2label = load_image_dataset(**source, **columns, seed=seed)
    if id2label is not None:
        images = renumber_labels(images, match_classes(id2label, diffusion.id2label))
    if pair is not None:
        images = pair(images, source)
    if stored is not None:
        images = check_latents(images, stored, folder, allow_unlabelled, data_args.image_check_num_proc)
    else:
        images, _ = check_images(
            images,
            diffusion.resolution,
            min_image_size=diffusion.min_image_size,
            num_proc=data_args.image_check_num_proc,
            image_format=diffusion.image_format,
            condition_format=diffusion.condition_format,
            condition_range_argument="--condition_value_range" if pair is None else "--source_value_range",
            allow_unlabelled=allow_unlabelled,
        )
    captions = held_out_captions(diffusion, images["caption"][:]) if "caption" in images.column_names else None
    return diffusion.build_dataset(images, masks, dataset_class, stored, center_crop=True, captions=captions)


def held_out_captions(diffusion: Diffusion, texts: Sequence[Any]) -> CaptionTokens | CaptionEmbeddings:
    """The captions of held-out images, encoded before if those of training are."""
    encoder: Any = diffusion.text_encoder
    tokens = CaptionTokens(texts, diffusion.tokenizer, encoder, pads_to_max(encoder, diffusion.unet.config))
    if not isinstance(diffusion.captions, CaptionEmbeddings):
        return tokens
    embeddings, home = diffusion.image_embeddings, encoder.device
    encoder.to(diffusion.device)
    try:
        masks_padding = embeddings is not None and embeddings.has_clip_text
        return CaptionEmbeddings(tokens, encoder, diffusion.args.data.cache_dir, masks_padding=masks_padding)
    finally:
        encoder.to(home)


def held_out_measures(diffusion: Diffusion, dataset: ImageDataset | None) -> list[str]:
    """The names of what `HeldOutMeasures` measures, as in the log, for `keep_best`."""
    if dataset is None:
        return []
    args = diffusion.args
    names = ["loss", "mse"] + ["vb"] * (args.diffusion.objective != "simple")
    names += ["bits_per_dim"] * (args.training.validation_bits_per_dim is not None)
    names += ["frechet_distance"] * (args.training.validation_frechet_network is not None)
    return [f"validation_{name}" for name in names]


def stratified_timesteps(num_images: int, num_train_timesteps: int, seed: int) -> torch.Tensor:
    """
    Timesteps `(num_images, TIMESTEPS_PER_IMAGE)`: one of each image in each part of the schedule, in column order, and
    evenly spaced over all images, which get theirs in an order that depends on the seed.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "held-out timesteps"))
    places = torch.rand(num_images, TIMESTEPS_PER_IMAGE, generator=generator).argsort(dim=0)
    places = places + num_images * torch.arange(TIMESTEPS_PER_IMAGE)  # among those of all images
    # The middle of each of as many parts of the schedule.
    return (2 * places + 1) * num_train_timesteps // (2 * num_images * TIMESTEPS_PER_IMAGE)


# 2. Measures


class HeldOutMeasures:
    """
    Measures the averaged weights on held-out images.

    Args:
        run (`TrainingRun`), diffusion (`Diffusion`): The run and its model.
        dataset (`ImageDataset`, *optional*): From `load_held_out`; `None`: nothing is measured.
        conditions (sequence of `Condition`): Those of the loop, but never dropped (see `Diffusion.conditions`), and
            with networks that are not wrapped.
        model (callable, *optional*): Called as in `training_losses`; `None`: the U-Net.
        build_pipeline (callable, *optional*), arguments_of (callable, *optional*): For the Frechet distance: the
            pipeline, and its arguments for an `Example`.

    Raises:
        ValueError: If a measure was asked for that these data do not have.
    """

    def __init__(
        self,
        run: TrainingRun,
        diffusion: Diffusion,
        dataset: ImageDataset | None,
        conditions: Sequence[Condition],
        model: Callable[..., Any] | None = None,
        build_pipeline: Callable[[], DiffusionPipeline] | None = None,
        arguments_of: Callable[[Example], dict[str, Any]] = lambda example: example[1],
    ):
        self.run, self.diffusion, self.dataset, self.conditions = run, diffusion, dataset, conditions
        self.model = diffusion.unet if model is None else model
        self.build_pipeline, self.arguments_of = build_pipeline, arguments_of
        self.args, accelerator = diffusion.args.training, run.accelerator
        self.rank, self.num_processes, self.device = (
            accelerator.process_index,
            accelerator.num_processes,
            accelerator.device,
        )
        self.network, self.real_features = None, None
        if dataset is None:
            return
        self.timesteps = stratified_timesteps(
            len(dataset), diffusion.noise_scheduler.config.num_train_timesteps, self.args.seed
        )
        if self.args.validation_bits_per_dim is not None:
            self._check_has_levels()
        if self.args.validation_frechet_network is not None:
            source, cache_dir = self.args.validation_frechet_network, diffusion.args.data.cache_dir
            if diffusion.stored_latents is not None:
                raise ValueError(
                    f"`validation_frechet_network` is {source!r}, but the held-out data are stored latents, and the "
                    "distance is that of images. Train on images, which are encoded in the loop, or leave it out."
                )
            if len(dataset) < 2:
                raise ValueError("The Frechet distance needs two held-out images or more; there is one.")
            network = load_feature_classifier("validation_frechet_network", source, diffusion.image_format, cache_dir)
            self.network = network.to(self.device)
        sharded = getattr(run, "is_sharded", False)
        asked = [
            name
            for name in ("validation_bits_per_dim", "validation_frechet_network")
            if getattr(self.args, name) is not None
        ]
        if sharded and asked:
            raise ValueError(
                f"`{asked[0]}` was given, but the weights are split over processes, which would wait for each other. "
                "Leave it out, and measure the result with `python -m diffusers_adm.evaluation`."
            )

    def _check_has_levels(self) -> None:
        name, image_format = "validation_bits_per_dim", self.diffusion.image_format
        if self.diffusion.latent_space is not None:
            raise ValueError(
                f"`{name}` was given, but the model is trained in latents, whose density has no bits of levels. Leave "
                "it out; the held-out loss is measured all the same."
            )
        if image_format.num_levels is None:
            raise ValueError(
                f"`{name}` was given, but the data are {image_format}: values without levels have a probability "
                "density, whose bits depend on the unit. Leave it out."
            )

    def validate(self) -> bool:
        """
        Measures, and writes the measures to the log and, for the model card, to the folder of the run. Collective.
        Returns whether it succeeded; see `TrainingRun.validate`.
        """
        if self.dataset is None:
            return True
        local: dict[str, torch.Tensor] = {}

        def measure() -> None:
            device = self.device.type
            devices = [self.device] if device != "cpu" else []
            # Training goes on with its own random numbers.
            with (
                torch.random.fork_rng(devices, device_type=device if devices else "cuda"),
                torch.no_grad(),
                self.run.evaluation_weights(),
            ):
                local["losses"] = self._losses()
                if self.args.validation_bits_per_dim is not None:
                    local["bits"] = self._bits()
                if self.network is not None:
                    if self.real_features is None:
                        self.real_features = self._features_of_images()
                    local["real"], local["fake"] = self.real_features, self._features_of_samples()

        if not self.run.validate(measure):
            return False
        # Each process has filled its rows of tensors of zeros, so that their sum is exact.
        whole = {
            name: self.run.accelerator.reduce(rows.to(self.device), reduction="sum").cpu().double()
            for name, rows in local.items()
        }
        return self.run.validate(lambda: self._report(whole))

    def _batches(self) -> list[range]:
        size = self.args.train_batch_size
        return [range(start, min(start + size, len(self.dataset))) for start in range(0, len(self.dataset), size)]

    def _inputs(self, batch: dict[str, torch.Tensor], number: int) -> tuple[torch.Tensor, UNetInputs]:
        """Samples and conditions of a batch, with random numbers that depend only on its number."""
        torch.manual_seed(derive_seed(self.args.seed, "held-out conditions", number))
        samples = self.diffusion.samples(batch)
        return samples, merge(condition.for_training(batch) for condition in self.conditions)

    def _losses(self) -> torch.Tensor:
        """The terms of the loss of this process' images, `(images, timesteps, 3)`, and zeros for the others."""
        batches, diffusion = self._batches(), self.diffusion
        # As many passes on each process: where weights are split, they wait for each other.
        passes = math.ceil(len(batches) / self.num_processes)
        numbers = [min(self.rank + index * self.num_processes, len(batches) - 1) for index in range(passes)]
        loader = DataLoader(
            self.dataset,
            batch_sampler=[list(batches[number]) for number in numbers],
            num_workers=diffusion.args.data.dataloader_num_workers,
            worker_init_fn=keep_to_parent,
        )
        values = torch.zeros(*self.timesteps.shape, len(TERMS))
        for index, (number, batch) in enumerate(zip(numbers, loader, strict=True)):
            samples, inputs = self._inputs(send_to_device(batch, self.device), number)
            terms = [self._terms(samples, inputs, batches[number], part) for part in range(TIMESTEPS_PER_IMAGE)]
            if self.rank + index * self.num_processes < len(batches):  # not a pass for the others only
                values[list(batches[number])] = torch.stack(terms, dim=1).cpu()
        return values

    def _terms(self, samples: torch.Tensor, inputs: UNetInputs, places: range, part: int) -> torch.Tensor:
        diffusion, objective = self.diffusion, self.diffusion.args.diffusion.objective
        noise = torch.empty(samples.shape)
        for row, place in zip(noise, places, strict=True):
            generator = torch.Generator().manual_seed(derive_seed(self.args.seed, "held-out noise", place, part))
            row.normal_(generator=generator)
        losses = training_losses(
            self.model,
            diffusion.noise_scheduler,
            samples,
            self.timesteps[list(places), part].to(self.device),
            noise=noise.to(samples),
            objective=objective,
            snr_gamma=diffusion.args.diffusion.snr_gamma,
            num_levels=diffusion.num_levels,
            extra_channels=inputs.extra_channels,
            model_kwargs=inputs.kwargs,
        )
        return torch.stack([getattr(losses, name).float() for name in TERMS], dim=1)

    def _bits(self) -> torch.Tensor:
        """Bits per dimension of this process' images, `(images,)`, and zeros for the others."""
        chosen = choose(len(self.dataset), self.args.validation_bits_per_dim, self.args.seed)
        mine = range(self.rank, len(chosen), self.num_processes)
        values = torch.zeros(len(chosen))
        if not mine:
            return values
        inputs: list[UNetInputs] = []
        size = self.args.train_batch_size
        for start in range(0, len(mine), size):
            rows = [self.dataset[chosen[place]] for place in mine[start : start + size]]
            batch = send_to_device(torch.utils.data.default_collate(rows), self.device)
            inputs.append(self._inputs(batch, start)[1])
        result = bits_per_dim(
            _WithConditions(self.model, inputs, [chosen[place] for place in mine], self.device),
            self.diffusion.noise_scheduler,
            _Numbered(self.dataset),
            batch_size=size,
            num_images=len(chosen),
            seed=self.args.seed,
            progress_bar=False,
            num_levels=self.diffusion.image_format.num_levels,
            share=(self.rank, self.num_processes),
        )
        values[list(mine)] = result.total.float()
        return values

    def _features_of_images(self) -> torch.Tensor:
        """Features of this process' held-out images, `(images, dim)`, and zeros for the others."""
        mine = range(self.rank, len(self.dataset), self.num_processes)
        return self._features([self.dataset[place]["images"] for place in mine], mine, len(self.dataset))

    def _features_of_samples(self) -> torch.Tensor:
        """Features of this process' samples, for the conditions of evenly spaced images; zeros for the others."""
        number = self.args.validation_frechet_samples or len(self.dataset)
        mine = range(self.rank, number, self.num_processes)
        places = [len(self.dataset) * place // number for place in mine]
        examples = [example_at(self.dataset, place, self.diffusion.null_class_id) for place in places]
        if self.diffusion.image_embeddings is not None:
            self.diffusion.image_embeddings.complete(examples)
        wanted = [self.arguments_of(example) for example in examples]
        samples: Any = []
        if wanted:
            samples = generate_samples(self.build_pipeline(), wanted, self.args, numbers=mine)
        return self._features(samples, mine, number)

    def _features(self, images: Sequence[torch.Tensor], places: Sequence[int], number: int) -> torch.Tensor:
        size, rows = self.args.train_batch_size, []
        for start in range(0, len(images), size):
            rows.append(features_of(self.network, torch.stack(list(images[start : start + size]))).float().cpu())
        # A process without an image learns the width, too.
        width = rows[0].shape[1] if rows else features_of(self.network, self.dataset[0]["images"][None]).shape[1]
        values = torch.zeros(number, width)
        if rows:
            values[list(places)] = torch.cat(rows)
        return values

    def _report(self, whole: dict[str, torch.Tensor]) -> None:
        run, step = self.run, self.run.progress.global_step
        values = loss_means(whole["losses"], self.timesteps, self.diffusion.noise_scheduler.config.num_train_timesteps)
        if self.diffusion.args.diffusion.objective == "simple":
            del values["vb"]
        described = [f"loss {values['loss']:.4f} ± {values.get('loss_standard_error', math.nan):.4f}"]
        if "bits" in whole:
            values |= mean_and_standard_error("bits_per_dim", whole["bits"])
            error = values.get("bits_per_dim_standard_error", math.nan)
            described.append(f"{values['bits_per_dim']:.3f} ± {error:.3f} bits/dim of {len(whole['bits'])}")
        if "real" in whole:
            statistics = GaussianStatistics(), GaussianStatistics()
            for moments, name in zip(statistics, ("real", "fake"), strict=True):
                moments.update(whole[name])
            real, fake = statistics
            values["frechet_distance"] = frechet_distance(real.mean, real.covariance, fake.mean, fake.covariance)
            described.append(f"Frechet distance {values['frechet_distance']:.3f} of {len(whole['fake'])} samples")
        run.log.write_validation(step, values)
        run.logger.info(f"Validation at step {step} on {len(self.dataset)} held-out images: {', '.join(described)}")
        if run.accelerator.is_main_process:
            record: dict[str, Any] = {**values, "num_images": len(self.dataset), "step": step, "held_out": True}
            if "bits" in whole:
                record["bits_per_dim_num_images"] = len(whole["bits"])
            if "fake" in whole:
                record |= {
                    "num_samples": len(whole["fake"]),
                    "num_inference_steps": self.args.validation_num_inference_steps,
                    "frechet_network": self.args.validation_frechet_network,
                }
            write_whole(Path(self.args.output_dir, MEASURES_NAME), json.dumps(record, indent=2) + "\n")


def mean_and_standard_error(name: str, values: torch.Tensor) -> dict[str, float]:
    """The mean of independent values `(n,)`, and its standard error if there are two or more."""
    result = {name: values.mean().item()}
    if len(values) > 1:
        result[f"{name}_standard_error"] = (values.std() / math.sqrt(len(values))).item()
    return result


def loss_means(losses: torch.Tensor, timesteps: torch.Tensor, num_train_timesteps: int) -> dict[str, float]:
    """
    `loss` with its standard error over the images, `mse` and `vb`, and the loss by quarter of the timesteps, `loss_q0`
    to `loss_q3`.

    Args:
        losses (`torch.Tensor` of shape `(images, timesteps, 3)`): The terms of the loss.
        timesteps (`torch.LongTensor` of shape `(images, timesteps)`): In `[0, num_train_timesteps)`.
        num_train_timesteps (`int`): Of the noise schedule.
    """
    values = mean_and_standard_error("loss", losses[..., 0].mean(dim=1))
    values |= {name: losses[..., index].mean().item() for index, name in enumerate(TERMS) if name != "loss"}
    quarters = timesteps * NUM_QUARTERS // num_train_timesteps
    for quarter in range(NUM_QUARTERS):
        if (quarters == quarter).any():
            values[f"loss_q{quarter}"] = losses[..., 0][quarters == quarter].mean().item()
    return values


class _Numbered(Dataset):
    """Pairs of an image and its number, in the place of a label."""

    def __init__(self, dataset: ImageDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.dataset[number]["images"], torch.tensor(number)


class _WithConditions(torch.nn.Module):
    """
    A network without conditions, for `bits_per_dim`: the label of an image is its number. The inputs are those of the
    images of these `numbers`, ascending.
    """

    def __init__(
        self, model: Callable[..., Any], inputs: Sequence[UNetInputs], numbers: Sequence[int], device: torch.device
    ):
        super().__init__()
        self.call = lambda *args, **kwargs: model(*args, **kwargs)  # no module of this one, which keeps its mode
        self.numbers, self.device, self.dtype = torch.tensor(numbers, device=device), device, torch.float32
        self.kwargs = _join([each.kwargs for each in inputs])
        channels = [each.extra_channels for each in inputs if each.extra_channels is not None]
        self.extra_channels = torch.cat(channels) if channels else None

    def forward(self, sample: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor) -> Any:
        rows = torch.searchsorted(self.numbers, class_labels)
        if self.extra_channels is not None:
            sample = torch.cat([sample, self.extra_channels.index_select(0, rows).to(sample)], dim=1)
        return self.call(sample, timesteps, **_select(self.kwargs, rows))


def _join(parts: Sequence[Any]) -> Any:
    """Batches of keyword arguments in one."""
    first = parts[0]
    if isinstance(first, dict):
        return {name: _join([part[name] for part in parts]) for name in first}
    return torch.cat(list(parts)) if torch.is_tensor(first) else first


def _select(value: Any, rows: torch.Tensor) -> Any:
    if isinstance(value, dict):
        return {name: _select(each, rows) for name, each in value.items()}
    return value.index_select(0, rows) if torch.is_tensor(value) else value
