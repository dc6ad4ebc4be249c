"""A prior of unCLIP in training, and its data: arguments, loading, statistics of the embeddings, and validation."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from diffusers import PriorTransformer

from ..commands.arguments import arg, check_at_least
from ..conditioning.prior import PriorSampler
from ..conditioning.text import TextConditioning, max_prompt_length, pads_to_max
from ..data.captions import CaptionEmbeddings, Captions, CaptionTokens
from ..data.checks import check_batch_fits
from ..data.clip_models import ClipText, hash_clip_vision, load_clip_text, load_clip_vision
from ..data.columns import first_caption
from ..data.embeddings import EmbeddingDataset, StoredEmbeddings, load_embeddings
from ..data.labels import list_names
from ..data.seeding import derive_seed
from ..ops.finiteness import explain_weights
from ..schedulers.scheduling_ddpm_learned_variance import LearnedVarianceDDPMScheduler, PredictionType
from .arguments import (
    APPLIED,
    FREE,
    PROCESS,
    SOURCE,
    NetworkArguments,
    NoiseArguments,
    TrainingArguments,
    check_needs,
    check_positive,
    check_share,
)
from .disk import write_whole
from .loading import check_config_keys, check_num_steps, load_model_config, load_noise_scheduler, load_pretrained
from .metrics import LossMetrics
from .resume import RunRecord
from .sharding import whole_tensor


if TYPE_CHECKING:
    import datasets  # of the `train` extra

    from .run import TrainingRun


logger = get_logger(__name__)

MEASURES_NAME = "prior_similarity.json"
# Of a new prior. The paper predicts x_0 with a cosine schedule, and Karlo samples at evenly spaced timesteps, the last
# one included: at t < T - 1, as "leading" starts, x_t is not yet standard normal.
NOISE_DEFAULTS = {
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "sample",
    "variance_type": "fixed_small",
    "timestep_spacing": "linspace",
}
# Folders of the scheduler of a pretrained prior: in our pipelines and Karlo's, and in a pipeline of a prior only.
SCHEDULER_FOLDERS = ("prior_scheduler", "scheduler")
NUM_ADDED_TOKENS = 4  # text embedding, timestep, noisy image embedding, and the token that is read
SAMPLED_AT_ONCE, MEASURED_AT_ONCE = 256, 4096  # embeddings

# 1. Arguments


@dataclass
class PriorModelArguments(NetworkArguments):
    """Where the weights come from, and the CLIP."""

    clip: str | None = arg(
        None,
        "CLIP with projections, on the Hub or in a folder: its vision tower made the embeddings, and its text tower "
        "encodes the captions and becomes a part of the result.",
        resume=SOURCE,
    )

    def check_source(self) -> None:
        """Raises a `ValueError` unless the CLIP and exactly one source of the network are given."""
        super().check_source()
        if self.clip is None:
            raise ValueError("Pass `--clip`: the CLIP whose embeddings the prior is trained on.")


@dataclass
class PriorDataArguments:
    """Embeddings of images, and their captions."""

    train_data_dir: str | None = arg(
        None, "Folder of embeddings that `diffusers_adm.data.encode_embeddings` wrote.", resume=PROCESS
    )
    caption_column: str = arg(
        "text", "Column of the captions: texts, or lists of which each epoch draws one text.", resume=PROCESS
    )
    random_flip: bool = arg(False, "Take the embeddings of mirrored images for half of the images.", resume=PROCESS)
    max_train_samples: int | None = arg(None, "Size of a random subset to train on; none: all images.", resume=PROCESS)
    caption_dropout_prob: float = arg(
        0.1, "Share of the captions replaced by the empty one, for classifier-free guidance.", resume=APPLIED
    )
    precompute_text_embeddings: bool = arg(
        True, "Encode each distinct caption once, before training, and store the result on disk.", resume=FREE
    )
    validation_data_dir: str | None = arg(None, "Folder of embeddings of held-out images.", resume=FREE)
    validation_caption_column: str | None = arg(
        None, "Column of their captions, of which the first is used; none: `caption_column`.", resume=FREE
    )
    max_validation_samples: int | None = arg(
        None, "Size of a random subset to validate on; none: all held-out images.", resume=FREE
    )
    cache_dir: str | None = arg(None, "Cache folder of datasets and pretrained models.", resume=FREE)
    dataloader_num_workers: int = arg(
        0, "Number of processes that load embeddings; 0: the training process itself.", resume=FREE
    )

    class_balanced: ClassVar[bool] = False  # there are no classes

    def __post_init__(self) -> None:
        check_share(self, "caption_dropout_prob")
        check_at_least(self, 0, "dataloader_num_workers")
        check_at_least(self, 1, "max_train_samples", "max_validation_samples")
        check_needs(self, "validation_data_dir", "validation_caption_column", "max_validation_samples")


@dataclass
class PriorNoiseArguments(NoiseArguments):
    """The noise schedule (by default, the cosine one), and the prediction of the prior."""

    prediction_type: PredictionType | None = arg(
        None,
        "Quantity that the prior predicts: the embedding (sample, the default), as in the paper, its noise (epsilon), "
        "or v_prediction.",
        resume=PROCESS,
    )
    clip_sample_range: float | None = arg(
        None,
        "Sampling clips predicted embeddings, which are standardised, to this absolute value. None: that of the "
        "pretrained prior, or the largest one of the training data.",
        resume=FREE,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "clip_sample_range")

    def check_betas(self, is_pretrained: bool) -> None:
        """Raises a `ValueError` for betas that the schedule of a new prior would not use."""
        given = [name for name in ("beta_start", "beta_end") if getattr(self, name) is not None]
        if given and not is_pretrained and self.ddpm_beta_schedule is None:
            raise ValueError(
                f"`{given[0]}` is {getattr(self, given[0])}, but a new prior has the cosine noise schedule, which is "
                f"defined without it: drop `{given[0]}`, or pass `--ddpm_beta_schedule linear`."
            )


@dataclass
class PriorTrainingArguments(TrainingArguments):
    """Training arguments of a prior."""

    output_dir: str = arg("prior", "Folder of the prior, checkpoints and curves.", resume=FREE)
    validation_num_inference_steps: int = arg(25, "Sampling steps of validation.", resume=FREE)
    validation_guidance_scale: float = arg(1.0, "Classifier-free guidance scale of validation; 1 is off.", resume=FREE)
    validation_candidates: int = arg(
        2,
        "Validation also samples this many embeddings for each caption, of which it keeps the one most similar to the "
        "text embedding; 1: it does not.",
        resume=FREE,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "validation_num_inference_steps", "validation_candidates")
        if not math.isfinite(self.validation_guidance_scale):
            raise ValueError(
                f"`validation_guidance_scale` is {self.validation_guidance_scale}; it must be a finite number."
            )


PRIOR_ARGUMENTS = (PriorModelArguments, PriorDataArguments, PriorNoiseArguments, PriorTrainingArguments)


# 2. Statistics of the embeddings


@dataclass
class EmbeddingMoments:
    """
    Mean and standard deviation of embeddings by channel, float64 of shape `(width,)`, and the largest absolute value of
    standardised ones.
    """

    mean: torch.Tensor
    std: torch.Tensor
    largest: float


def measure_embeddings(dataset: EmbeddingDataset, accelerator: Accelerator) -> EmbeddingMoments:
    """
    Measures the embeddings of a dataset, of mirrored images as well if it draws from them. Collective: each process
    sums a share, in float64.

    Raises:
        ValueError: If a channel has the same value in all embeddings.
    """
    own = range(accelerator.process_index, len(dataset), accelerator.num_processes)
    sums = torch.zeros(2, dataset.width, dtype=torch.float64)
    extremes = torch.full((2, dataset.width), -math.inf, dtype=torch.float64)  # largest value, and largest of -value
    for start in range(0, len(own), MEASURED_AT_ONCE):
        for rows in (dataset.rows[name] for name in dataset.columns):
            values = torch.from_numpy(np.stack([rows[index] for index in own[start : start + MEASURED_AT_ONCE]]))
            values = values.double()
            sums += torch.stack([values.sum(dim=0), values.square().sum(dim=0)])
            extremes = torch.maximum(extremes, torch.stack([values.amax(dim=0), (-values).amax(dim=0)]))
    # Objects, since not every device has float64.
    shares = gather_object([(sums.tolist(), extremes.tolist())])
    total = torch.tensor([share[0] for share in shares], dtype=torch.float64).sum(dim=0)
    high, low = torch.tensor([share[1] for share in shares], dtype=torch.float64).amax(dim=0)
    mean, second = total / (len(dataset) * len(dataset.columns))
    std = (second - mean.square()).clamp(min=0).sqrt()
    constant = torch.nonzero(high + low <= 0)[:, 0].tolist()
    if constant:
        raise ValueError(
            f"The embeddings of all {len(dataset)} images have the same value in {len(constant)} of {dataset.width} "
            f"channels (numbers {list_names(constant)}, counted from 0), so they cannot be standardised. Check the "
            "CLIP and the data."
        )
    largest = torch.maximum((high - mean) / std, (low + mean) / std).max()
    return EmbeddingMoments(mean, std, float(largest))


# 3. Loading


@dataclass
class PriorTraining:
    """A prior in training, and its data."""

    args: PriorTrainingArguments
    prior: PriorTransformer
    noise_scheduler: LearnedVarianceDDPMScheduler
    text: ClipText
    captions: Captions  # of the training data
    train_dataset: EmbeddingDataset
    held_out: EmbeddingDataset | None
    metrics: LossMetrics

    def standardize(self, image_embeds: torch.Tensor) -> torch.Tensor:
        """Embeddings `(batch_size, width)` with mean 0 and standard deviation 1 by channel, in which noise is added."""
        return (image_embeds - whole_tensor(self.prior.clip_mean)) / whole_tensor(self.prior.clip_std)

    def save(self, folder: str) -> None:
        """Saves the prior, its scheduler, and text encoder and tokenizer of the CLIP, as parts of a pipeline."""
        self.prior.save_pretrained(os.path.join(folder, "prior"))
        self.noise_scheduler.save_pretrained(os.path.join(folder, "prior_scheduler"))
        self.text.model.save_pretrained(os.path.join(folder, "prior_text_encoder"))
        self.text.tokenizer.save_pretrained(os.path.join(folder, "prior_tokenizer"))

    def validation_measures(self) -> list[str]:
        """The names of what `validate_prior` measures of the prior, as in the log, for `keep_best`."""
        if self.held_out is None:
            return []
        names = ["similarity", "best_similarity"] if self.args.validation_candidates > 1 else ["similarity"]
        return [f"validation_{name}" for name in names]

    def describe(self) -> str:
        """The data in words."""
        return (
            f"{len(self.train_dataset)} embeddings of width {self.train_dataset.width} with "
            f"{len(self.captions.texts) - 1} captions, {len(self.held_out) if self.held_out else 0} held-out ones"
        )


def prior_inputs(text: TextConditioning) -> dict[str, torch.Tensor]:
    """
    Keyword arguments of the prior for encoded captions. With a mask, the prior is also causal, as in the paper; without
    one, diffusers' class is not.
    """
    return {
        "proj_embedding": text.pooled,
        "encoder_hidden_states": text.hidden_states,
        "attention_mask": text.attention_mask,
    }


def load_prior_config(model_args: PriorModelArguments, data_args: PriorDataArguments) -> dict[str, Any]:
    """Loads the config of the prior, before any data. Raises a `ValueError` if it is not one of `PriorTransformer`."""
    config = load_model_config(PriorTransformer, "prior", model_args, data_args)
    source = model_args.pretrained_model_name_or_path or model_args.model_config_name_or_path
    class_name = config.get("_class_name", "PriorTransformer")
    if class_name != "PriorTransformer":
        raise ValueError(f"{source} is the config of `{class_name}`; this script trains `PriorTransformer`.")
    if model_args.pretrained_model_name_or_path is None:
        check_config_keys(config, PriorTransformer, source)
    return config


def fit_prior_config(config: Mapping[str, Any], width: int, text: ClipText, is_pretrained: bool) -> dict[str, Any]:
    """
    The config of a prior for image embeddings of a `width` and the text tower of their CLIP. A new config may leave out
    `embedding_dim` and `num_embeddings`.

    Raises:
        ValueError: If the config is incompatible with the CLIP, or is no prior of unCLIP.
    """
    encoder, length = text.model.config, max_prompt_length(text.tokenizer, text.model)
    if encoder.projection_dim != width:
        raise ValueError(
            f"The image embeddings have the width {width}, but the text tower of `clip` projects to "
            f"{encoder.projection_dim}. Name a CLIP whose towers project to the same width."
        )
    defaults = {"embedding_dim": 768, "num_embeddings": 77} if is_pretrained else {}
    fitted = {"embedding_dim": width, "num_embeddings": length, **defaults, **config}
    way_out = "Use the CLIP that the prior was trained with." if is_pretrained else "Leave it out of the config."
    if fitted["embedding_dim"] != width:
        raise ValueError(
            f"The prior has `embedding_dim` {fitted['embedding_dim']}, but the embeddings of the CLIP have the width "
            f"{width}. {way_out}"
        )
    for name in ("embedding_proj_dim", "clip_embed_dim"):
        if fitted.get(name) not in (None, width):
            raise ValueError(
                f"The prior has `{name}` {fitted[name]}, but text and image embeddings of the CLIP have the width "
                f"{width}. {way_out}"
            )
    if fitted["num_embeddings"] != length:
        raise ValueError(
            f"The prior takes captions of `num_embeddings` {fitted['num_embeddings']} tokens, but the CLIP pads them "
            f"to {length}. {way_out}"
        )
    if fitted.get("added_emb_type", "prd") != "prd":
        raise ValueError(
            f"The prior has `added_emb_type` {fitted['added_emb_type']!r}; a prior of unCLIP has 'prd', the token at "
            "the end from which the embedding is read."
        )
    if fitted.get("additional_embeddings", NUM_ADDED_TOKENS) != NUM_ADDED_TOKENS:
        raise ValueError(
            f"The prior has `additional_embeddings` {fitted['additional_embeddings']}; a prior of unCLIP has "
            f"{NUM_ADDED_TOKENS}: text embedding, timestep, noisy image embedding, and the token that is read."
        )
    inner_dim = fitted.get("num_attention_heads", 32) * fitted.get("attention_head_dim", 64)
    if fitted.get("encoder_hid_proj_type", "linear") is None:
        if encoder.hidden_size != inner_dim:
            raise ValueError(
                "The prior takes the states of the text tower as they are (`encoder_hid_proj_type` null), with "
                f"`num_attention_heads` x `attention_head_dim` = {inner_dim} channels, but those of the CLIP have the "
                f"width {encoder.hidden_size} (`hidden_size`). Make them equal."
            )
    elif encoder.hidden_size != width:
        raise ValueError(
            f"The states of the CLIP's text tower have the width {encoder.hidden_size} (`hidden_size`), but "
            f"`PriorTransformer` projects states of the width of the embeddings, {width}. Use a CLIP with equal "
            "widths, or set `encoder_hid_proj_type` to null and `num_attention_heads` x `attention_head_dim` to "
            f"{encoder.hidden_size}, so that the states are taken as they are."
        )
    return fitted


def build_prior(
    model_args: PriorModelArguments, data_args: PriorDataArguments, config: Mapping[str, Any], is_pretrained: bool
) -> PriorTransformer:
    """
    Loads the pretrained prior, or makes one from scratch. Mean and standard deviation of the embeddings are not
    trained.
    """
    if is_pretrained:
        load = PriorTransformer.from_pretrained
        prior = load_pretrained(load, "prior", model_args, data_args, variant=model_args.variant)
        prior.float()
        wrong = explain_weights("pretrained_model_name_or_path", prior)
        if wrong is None and not bool((prior.clip_std > 0).all()):
            wrong = (
                f"{model_args.pretrained_model_name_or_path} has values of `clip_std` that are not positive: the "
                "statistics of its embeddings were never stored, or its file is damaged."
            )
        if wrong is not None:
            raise ValueError(wrong)
    else:
        prior = PriorTransformer.from_config(config)
    prior.clip_mean.requires_grad_(False)
    prior.clip_std.requires_grad_(False)
    return prior


def scheduler_folder(model_args: PriorModelArguments, data_args: PriorDataArguments) -> str:
    """The folder of the pretrained prior's scheduler."""
    if model_args.pretrained_model_name_or_path is not None:
        hub = {"revision": model_args.revision, "cache_dir": data_args.cache_dir}
        for folder in SCHEDULER_FOLDERS:
            try:
                LearnedVarianceDDPMScheduler.load_config(
                    model_args.pretrained_model_name_or_path, subfolder=folder, **hub
                )
            except OSError:
                continue
            return folder
    return SCHEDULER_FOLDERS[0]


def load_stored_embeddings(
    argument: str, folder: str, model_args: PriorModelArguments, fingerprint: str
) -> StoredEmbeddings:
    """How the embeddings in a folder were made. Raises a `ValueError` for a folder without any, or of another CLIP."""
    stored = StoredEmbeddings.read(argument, folder)
    stored.check(fingerprint, model_args.clip, folder)
    return stored


def encode_captions_of(
    dataset: datasets.Dataset, text: ClipText, precompute: bool, device: torch.device | str, cache_dir: str | None
) -> CaptionTokens | CaptionEmbeddings:
    """The captions of a dataset as tokens, or encoded, with a mask of the padding."""
    tokens = CaptionTokens(dataset["caption"][:], text.tokenizer, text.model, pads_to_max(text.model, {}))
    text.model.to(device)
    return CaptionEmbeddings(tokens, text.model, cache_dir, masks_padding=True) if precompute else tokens


def load_prior_training(accelerator: Accelerator, record: RunRecord, args: Sequence[Any]) -> PriorTraining:
    """
    Loads noise schedule, CLIP, prior and data of a run, and checks that they are compatible with each other and with
    the checkpoint that is resumed. Cheap checks come first.

    Args:
        accelerator (`Accelerator`), record (`RunRecord`): From `start_run` and `parse_run`.
        args (sequence of dataclasses): Those of `PRIOR_ARGUMENTS`, in this order.
    """
    model_args, data_args, noise_args, training_args = args
    seed, is_pretrained = training_args.seed, model_args.pretrained_model_name_or_path is not None
    if data_args.train_data_dir is None:
        raise ValueError("Pass `--train_data_dir`: a folder that `diffusers_adm.data.encode_embeddings` wrote.")
    noise_args.check_betas(is_pretrained)
    config = load_prior_config(model_args, data_args)
    folder = scheduler_folder(model_args, data_args)
    noise_scheduler = load_noise_scheduler(model_args, data_args, noise_args, folder, NOISE_DEFAULTS)
    if noise_scheduler.has_learned_variance:
        raise ValueError(
            f"The scheduler of {model_args.pretrained_model_name_or_path} has `variance_type` "
            f"{noise_scheduler.config.variance_type!r}, but a prior predicts no variance. Set it to 'fixed_small'."
        )
    record.check_noise(noise_scheduler)
    check_num_steps(training_args.validation_num_inference_steps, noise_scheduler)
    fingerprint = hash_clip_vision(load_clip_vision("clip", model_args.clip, cache_dir=data_args.cache_dir))
    text = load_clip_text("clip", model_args.clip, cache_dir=data_args.cache_dir)
    stored = load_stored_embeddings("train_data_dir", data_args.train_data_dir, model_args, fingerprint)
    held_out, held_out_dir = None, data_args.validation_data_dir
    if held_out_dir is not None:
        held_out_stored = load_stored_embeddings("validation_data_dir", held_out_dir, model_args, fingerprint)
    config = fit_prior_config(config, stored.width, text, is_pretrained)
    # The same random numbers on every process, and in every run with this seed.
    torch.manual_seed(seed)
    prior = build_prior(model_args, data_args, config, is_pretrained)
    cache_dir, device = data_args.cache_dir, accelerator.device
    with accelerator.main_process_first():
        images = load_embeddings(
            data_args.train_data_dir, stored, data_args.caption_column, cache_dir, data_args.max_train_samples, seed
        )
        captions = encode_captions_of(images, text, data_args.precompute_text_embeddings, device, cache_dir)
        train_dataset = EmbeddingDataset(images, stored, captions, data_args.random_flip, seed)
        train_captions = images["caption"][:]
        if held_out_dir is not None:
            argument = "caption_column" if data_args.validation_caption_column is None else "validation_caption_column"
            column = getattr(data_args, argument)
            number = data_args.max_validation_samples
            images = load_embeddings(held_out_dir, held_out_stored, column, cache_dir, number, seed, argument)
            held_out_captions = encode_captions_of(images, text, True, device, cache_dir)
            held_out = EmbeddingDataset(images, held_out_stored, held_out_captions, seed=seed)
    if data_args.precompute_text_embeddings:
        text.model.to("cpu")  # nothing needs it any more
    check_batch_fits(len(train_dataset), training_args.train_batch_size, accelerator.num_processes)
    record.check_data(len(train_dataset), train_captions, stored)
    frozen = {"image encoder": fingerprint, "text encoder": text.model, "tokenizer": text.tokenizer}
    record.check_network(prior.config, None, frozen)

    moments = measure_embeddings(train_dataset, accelerator)
    if not is_pretrained:
        with torch.no_grad():
            prior.clip_mean.copy_(moments.mean)
            prior.clip_std.copy_(moments.std)
        noise_scheduler.register_to_config(clip_sample=True, clip_sample_range=moments.largest)
    if noise_args.clip_sample_range is not None:
        noise_scheduler.register_to_config(clip_sample=True, clip_sample_range=noise_args.clip_sample_range)
    logger.info(
        f"The embeddings have standard deviations from {moments.std.min():.4g} to {moments.std.max():.4g} by channel; "
        f"the largest standardised value is {moments.largest:.3g}"
        + ("; mean and standard deviation of the pretrained prior are kept" if is_pretrained else "")
    )
    prior.to(device)
    metrics = LossMetrics(noise_scheduler.config.num_train_timesteps, device)
    return PriorTraining(training_args, prior, noise_scheduler, text, captions, train_dataset, held_out, metrics)


# 4. Validation


@torch.no_grad()
def sample_held_out(training: PriorTraining, candidates: int) -> torch.Tensor:
    """
    Embeddings `(number, width)`, on the CPU, that the prior predicts for the first captions of the held-out images. The
    noise of each depends only on the seed and its number.
    """
    args, dataset, device = training.args, training.held_out, training.prior.device
    sampler = PriorSampler(training.prior, training.noise_scheduler)
    empty, parts = dataset.captions.empty, []
    for start in range(0, len(dataset), SAMPLED_AT_ONCE):
        numbers = range(start, min(start + SAMPLED_AT_ONCE, len(dataset)))
        tensors = [dataset.captions[number] for number in numbers]
        text, negative = (
            TextConditioning(
                *(
                    torch.stack([example[name] for example in examples]).to(device)
                    for name in ("caption_states", "caption_mask", "caption_pooled")
                )
            )
            for examples in (tensors, [empty] * len(numbers))
        )
        seeds = [derive_seed(args.seed, "prior validation", number) for number in numbers]
        embeds = sampler.sample_from(
            text,
            negative,
            num_inference_steps=args.validation_num_inference_steps,
            guidance_scale=args.validation_guidance_scale,
            num_candidates=candidates,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        )
        parts.append(embeds.float().cpu())
    return torch.cat(parts)


def mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    """The mean of values `(number,)`, and its standard error (NaN for a single value)."""
    values = values.double()
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


def similarity_measures(
    predicted: torch.Tensor, image_embeds: torch.Tensor, text_embeds: torch.Tensor, captions: Sequence[str]
) -> dict[str, float]:
    """
    Cosine similarities to the true image embeddings, means over images, each with its standard error (`..._error`):
    `similarity` of the predicted embeddings, `text_similarity` of the text embeddings, `shuffled_similarity` of the
    embeddings predicted for the captions of all other images (unless they have the same caption), and the differences
    `above_text` and `above_shuffled`, image by image.

    Args:
        predicted, image_embeds, text_embeds (`torch.Tensor` of shape `(number, width)`): Embeddings of the same images.
        captions (sequence of `str`): Their captions.
    """
    predicted, image_embeds, text_embeds = (
        F.normalize(embeds.double(), dim=1) for embeds in (predicted, image_embeds, text_embeds)
    )
    numbers = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    ids = torch.tensor([numbers[caption] for caption in captions])
    all_similarities = image_embeds @ predicted.T  # (images, captions)
    values = {"similarity": all_similarities.diagonal(), "text_similarity": (image_embeds * text_embeds).sum(dim=1)}
    values["above_text"] = values["similarity"] - values["text_similarity"]
    is_other = ids[:, None] != ids
    if len(numbers) > 1:
        values["shuffled_similarity"] = (all_similarities * is_other).sum(dim=1) / is_other.sum(dim=1)
        values["above_shuffled"] = values["similarity"] - values["shuffled_similarity"]
    measures = {}
    for name, of_images in values.items():
        measures[name], measures[f"{name}_error"] = mean_and_error(of_images)
    return measures


def _measure_prior(training: PriorTraining, held_out: EmbeddingDataset) -> dict[str, float]:
    candidates = training.args.validation_candidates
    captions = [first_caption(caption) for caption in held_out.dataset["caption"][:]]
    true = torch.stack([held_out[index]["image_embeds"] for index in range(len(held_out))])
    text = torch.stack([held_out.captions[index]["caption_pooled"] for index in range(len(held_out))])
    values = similarity_measures(sample_held_out(training, 1), true, text, captions)
    if candidates > 1:
        best = similarity_measures(sample_held_out(training, candidates), true, text, captions)
        values |= {f"best_{name}": best[name] for name in ("similarity", "similarity_error")}
    # Of a constant prediction, the mean of the training data.
    constant = F.cosine_similarity(true.double(), training.prior.clip_mean.detach().cpu().double())
    values["mean_similarity"], values["mean_similarity_error"] = mean_and_error(constant)
    return values


def validate_prior(training: PriorTraining, run: TrainingRun) -> None:
    """
    Measures the prior on held-out images, see `similarity_measures`, also the best of several candidates. Writes the
    measures to the log and, for the model card, to the folder of the run. On the main process.
    """
    args, held_out, is_main = training.args, training.held_out, run.accelerator.is_main_process
    if held_out is None or not (is_main or run.is_sharded):
        return
    with run.evaluation_weights():  # first, because it is collective if the run is sharded
        values = _measure_prior(training, held_out) if is_main else None
    if values is None:
        return
    described = ", ".join(
        f"{name.removesuffix('similarity').replace('_', ' ').strip() or 'prior'} {values[name]:.4f} ± "
        f"{values[f'{name}_error']:.4f}"
        for name in values
        if name.endswith("similarity")
    )
    step = run.progress.global_step
    run.logger.info(f"Step {step}, cosine similarity to the embeddings of {len(held_out)} held-out images: {described}")
    values = {name: value for name, value in values.items() if math.isfinite(value)}  # one image has no standard error
    run.log.write_validation(step, values)
    settings = {
        "num_images": len(held_out),
        "step": step,
        "num_inference_steps": args.validation_num_inference_steps,
        "guidance_scale": args.validation_guidance_scale,
        "candidates": args.validation_candidates,
    }
    path = Path(args.output_dir, MEASURES_NAME)
    write_whole(path, json.dumps({**values, **settings}, indent=2) + "\n")
