"""A diffusion model in training, and its data: everything that the scripts for diffusion models load alike."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline, ModelMixin

from ..conditioning.class_labels import ClassCondition
from ..conditioning.condition import Condition
from ..conditioning.control_images import ControlImageKind, condition_format_of
from ..conditioning.image_embedding import ImageEmbeddingCondition
from ..conditioning.image_format import ImageFormat, Size, as_sample_size, as_size, describe_size
from ..conditioning.latents import LatentSpace, Posterior
from ..conditioning.previews import check_preview_channels
from ..conditioning.text import TextCondition, check_text_encoder, cross_attention_width, pads_to_max
from ..data.captions import CaptionEmbeddings, CaptionTokens, StreamedCaptions
from ..data.checks import check_batch_fits, check_images, keep_labelled
from ..data.clip_models import hash_clip_vision
from ..data.columns import load_image_dataset
from ..data.decoding import smallest_size
from ..data.embeddings import embedding_columns_in_errors
from ..data.formats import FormatRequest, find_image_format
from ..data.images import ImageDataset
from ..data.labels import match_names, read_class_names
from ..data.latents import LatentDataset, StoredLatents, check_latents, load_latents
from ..data.masks import InpaintingDataset
from ..data.skipped import SkipReport
from ..data.stream_order import StreamOrder
from ..data.streaming import DEFAULT_BUFFER_SIZE, StreamDataset, StreamSource, open_stream
from ..data.text_encoders import build_text_encoder, freeze_unused_parameters, load_text_encoder, load_tokenizer
from ..deprecations import REMOVED_IN
from ..models.unet_2d_adagn import AdaGNUNet2DModel
from ..schedulers.noise_schedules import noise_schedule_of
from ..schedulers.scheduling_ddpm_learned_variance import LearnedVarianceDDPMScheduler
from .arguments import (
    DataArguments,
    DiffusionArguments,
    DiffusionTrainingArguments,
    HeldOutDataArguments,
    ImageEmbeddingArguments,
    ModelArguments,
    TextArguments,
    UNetArguments,
)
from .image_embeddings import PROJECTION_NAME, ImageEmbeddings, load_image_embeddings
from .latents import (
    TrainedLatents,
    check_latent_channels,
    check_stored_resolution,
    find_latents,
    leave_unclipped,
    load_latent_space,
)
from .loading import (
    begin_skip_report,
    choose_resolution,
    pretrained_image_format,
    pretrained_pipeline_config,
    training_image_format,
)
from .losses import Objective, TrainingLosses
from .metrics import LossMetrics, record_losses
from .resume import RunRecord
from .timestep_samplers import TimestepSampler
from .unets import (
    ExtraChannels,
    build_scheduler,
    build_unet,
    check_guidance,
    check_sampling_steps,
    constant_channels,
    load_unet_config,
    match_unet_classes,
    no_extra_channels,
    set_channels,
    spare_channels,
    widen_input,
)
from .validation import Example, Row, choose_examples, choose_rows


if TYPE_CHECKING:
    import datasets  # of the `train` extra

logger = get_logger(__name__)

Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline)


class CommonArguments(NamedTuple):
    """The arguments of all scripts for diffusion models, as in `DIFFUSION_ARGUMENTS`."""

    model: UNetArguments
    data: HeldOutDataArguments
    diffusion: DiffusionArguments
    training: DiffusionTrainingArguments
    text: TextArguments


@dataclass
class Diffusion:
    """A diffusion model in training, and its data."""

    args: CommonArguments
    unet: AdaGNUNet2DModel
    text_encoder: torch.nn.Module | None
    tokenizer: Any | None
    noise_scheduler: LearnedVarianceDDPMScheduler
    timestep_sampler: TimestepSampler
    metrics: LossMetrics
    images: datasets.Dataset  # the usable ones, labelled with the rows of the class embedding; the first of a stream
    captions: CaptionTokens | CaptionEmbeddings | StreamedCaptions | None
    id2label: dict[int, str] | None  # names of the rows of the class embedding
    num_classes: int | None  # of the data; None: trained without classes
    resolution: Size  # in pixels
    image_format: ImageFormat
    condition: ControlImageKind | None = None  # made from the images, for ControlNets
    condition_format: ImageFormat | None = None  # of conditioning images, if there are any
    latent_space: LatentSpace | None = None  # of the samples; None: they are pixels
    autoencoder_hash: str | None = None
    stored_latents: StoredLatents | None = None  # read instead of images
    image_embeddings: ImageEmbeddings | None = None  # of a decoder of unCLIP
    columns: dict[str, Any] = field(default_factory=dict)  # further ones of the data, as for `load_image_dataset`
    min_image_size: Size | None = None  # smaller images are left out
    device: torch.device | str = "cpu"  # of the run
    stream: StreamSource | None = None  # of which `images` are the first
    stream_order: StreamOrder | None = None
    process_index: int = 0
    smallest: tuple[int, int] | None = None  # of images that were not checked before
    skips: SkipReport | None = None  # of such images

    @property
    def null_class_id(self) -> int | None:
        """The row of the null class."""
        return self.unet.config.null_class_id

    @property
    def noise_schedule(self) -> dict[str, Any]:
        """The noise schedule as results record it."""
        return noise_schedule_of(self.noise_scheduler)

    @property
    def num_levels(self) -> int | None:
        """Number of levels of the samples, for the loss; `None`: they are continuous, as latents are."""
        return self.image_format.num_levels if self.latent_space is None else None

    @property
    def vae(self) -> ModelMixin | None:
        """The autoencoder; `None`: the samples are pixels."""
        return None if self.latent_space is None else self.latent_space.vae

    @property
    def factor(self) -> int:
        """Number of image pixels per sample pixel, along each side."""
        return 1 if self.latent_space is None else self.latent_space.factor

    def samples(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        The samples of a batch, which the U-Net is trained on: its images, in [-1, 1], or samples of their latents,
        encoded now or before. The images of the batch get the memory format of the run.
        """
        memory_format = self.args.model.memory_format
        if "images" in batch:
            batch["images"] = batch["images"].contiguous(memory_format=memory_format)
        if self.latent_space is None:
            return batch["images"]
        # The forward passes of prepared networks run under autocast, this one does not: stored latents do not depend
        # on the mixed precision of a run.
        with torch.no_grad():
            if self.stored_latents is not None:
                posterior = Posterior(batch["latent_mean"], batch["latent_std"])
            else:
                posterior = self.latent_space.posterior(batch["images"])
            samples = self.latent_space.to_samples(posterior, batch["latent_noise"])
        return samples.contiguous(memory_format=memory_format)

    def examples(self, dataset: ImageDataset, number: int) -> list[Example]:
        """Examples for validation images; see `validation.choose_examples`. Stored latents are decoded to `images`."""
        examples = choose_examples(dataset, number, self.null_class_id)
        if self.latent_space is not None and self.stored_latents is not None:
            for tensors, _ in examples:
                mean = tensors["latent_mean"][None].to(self.latent_space.vae.device)
                with torch.no_grad():
                    samples = self.latent_space.to_samples(Posterior(mean, torch.zeros_like(mean)))
                    tensors["images"] = self.latent_space.decode(samples)[0].float().clamp(-1, 1).cpu()
        if self.image_embeddings is not None:
            self.image_embeddings.complete(examples)
        return examples

    def frozen_parts(self, trains_unet: bool = True) -> dict[str, Any]:
        """
        The networks and the tokenizer that are not trained, by name; the autoencoder's hash; None for what there is
        not.
        """
        is_trained = self.args.text.train_text_encoder
        vision = None if self.image_embeddings is None else self.image_embeddings.vision
        return {
            "U-Net": None if trains_unet else self.unet,
            "text encoder": None if is_trained else self.text_encoder,
            "tokenizer": self.tokenizer,
            "autoencoder": self.autoencoder_hash,
            "image encoder": None if vision is None else hash_clip_vision(vision),
        }

    def trained_networks(self) -> dict[str, torch.nn.Module]:
        """
        U-Net and, if there are such, the text encoder that is trained and the projection of image embeddings, by the
        subfolders of a pipeline.
        """
        text_encoder = {"text_encoder": self.text_encoder} if self.args.text.train_text_encoder else {}
        embeddings = self.image_embeddings
        projection = {} if embeddings is None else {PROJECTION_NAME: embeddings.projection}
        return {"unet": self.unet} | projection | text_encoder

    def build_dataset(
        self,
        images: datasets.Dataset,
        masks: bool = False,
        dataset_class: Callable[..., ImageDataset] = ImageDataset,
        stored: StoredLatents | None = None,
        **options: Any,
    ) -> ImageDataset:
        """
        A dataset of usable images, or of `stored` latents (`None`: those that are trained on). `masks` and
        `dataset_class` are as for `datasets`, the `options` those of [`ImageDataset`].
        """
        latents: dict[str, Any] = {}
        if self.latent_space is not None:
            latents["latent_shape"] = (self.latent_space.channels, *self.latent_space.latent_size(self.resolution))
        if self.stored_latents is not None:
            dataset_class, latents = LatentDataset, {"stored": stored or self.stored_latents}
        return (InpaintingDataset if masks else dataset_class)(
            images,
            self.resolution,
            seed=self.args.training.seed,
            condition=self.condition,
            image_format=self.image_format,
            condition_format=self.condition_format,
            smallest=self.smallest,
            **options,
            **latents,
        )

    def datasets(
        self, masks: bool = False, dataset_class: Callable[..., ImageDataset] = ImageDataset
    ) -> tuple[ImageDataset | StreamDataset, ImageDataset]:
        """
        The training data, and the same images for validation, of a stream the first ones: cropped at the centre and
        without captions. With random masks for inpainting, or of another class.
        """
        data_args = self.args.data
        build = functools.partial(self.build_dataset, self.images, masks=masks, dataset_class=dataset_class)
        training = build(
            center_crop=data_args.center_crop,
            random_flip=data_args.random_flip,
            captions=self.captions,
            skips=self.skips,
        )
        return (
            training
            if self.stream is None
            else StreamDataset(self.stream, self.stream_order, training, self.process_index),
            # Nothing advances its epoch, so that crops and masks are the same in all validations.
            build(center_crop=True),
        )

    def conditions(
        self, prepared: Mapping[str, torch.nn.Module], held_out: ImageDataset | None = None
    ) -> list[Condition]:
        """
        The conditions of class, text and image embedding, as far as the data has them. `prepared` holds the networks
        that are trained, as prepared by Accelerate. Those of `held_out` images are never dropped.
        """
        captions = self.captions if held_out is None else held_out.captions
        # 1: dropped as in training.
        drops = 1.0 if held_out is None else 0.0
        conditions: list[Condition] = []
        embeddings, text = self.image_embeddings, None
        if self.num_classes is not None:
            conditions.append(ClassCondition(self.unet.config, dropout_prob=drops * self.args.model.class_dropout_prob))
        if captions is not None:
            text = TextCondition(
                self.unet.config,
                prepared.get("text_encoder", self.text_encoder),
                empty_caption=captions.empty,
                dropout_prob=drops * self.args.text.caption_dropout_prob,
                masks_padding=embeddings is not None and embeddings.has_clip_text,
            )
        if embeddings is not None:
            image = ImageEmbeddingCondition(
                prepared[PROJECTION_NAME],
                text,
                dropout_prob=drops * embeddings.args.dropout_prob,
                image_encoder=embeddings.encoder,
            )
            conditions.append(image)
        elif text is not None:
            conditions.append(text)
        return conditions

    def record_losses(self, terms: TrainingLosses, timesteps: torch.Tensor, weights: torch.Tensor) -> None:
        """Passes the losses of a batch to timestep sampler and metrics; see `metrics.record_losses`."""
        record_losses(terms, timesteps, weights, self.args.diffusion.objective, self.timestep_sampler, self.metrics)

    def validation_rows(self, prompts: Sequence[str] | None) -> list[Row]:
        """The conditions of validation images; see `validation.choose_rows`."""
        return choose_rows(self.images, self.id2label, self.null_class_id, prompts)

    def build_pipeline(self, pipeline_class: type[Pipeline], **components: Any) -> Pipeline:
        """A pipeline of the model, with further `components`."""
        embeddings = self.image_embeddings
        own = {
            **dict.fromkeys(pipeline_class._optional_components),
            "unet": self.unet,
            "scheduler": self.noise_scheduler,
            "vae": self.vae,
            "text_encoder": self.text_encoder,
            "tokenizer": self.tokenizer,
            **({} if embeddings is None else embeddings.components()),
        }
        return pipeline_class(
            **{**own, **components}, id2label=self.id2label, image_format=self.image_format.to_config()
        )

    def describe(self, further: str = "") -> str:
        """The data in words, `further` added before the resolution."""
        if self.stream is None:
            what = f"{len(self.images)} images"
            captions = f" with {len(self.captions.texts) - 1} captions" if self.captions is not None else ""
        else:
            num_shards = len(self.stream.sizes)
            what = f"{sum(self.stream.sizes)} images in {num_shards} shard{'s' * (num_shards != 1)}"
            captions = " with captions" if self.captions is not None else ""
        return (
            what
            + (f" in {self.num_classes} classes" if self.num_classes else "")
            + captions
            + ("" if self.image_embeddings is None else self.image_embeddings.describe())
            + f"{further} at {describe_size(self.resolution)}"
            + ("" if self.image_format == ImageFormat() else f", {self.image_format}")
            + ("" if self.latent_space is None else f", in latents {self._describe_latents()}")
        )

    def _describe_latents(self) -> str:
        space = self.latent_space
        where = "encoded in the loop" if self.stored_latents is None else "read from disk"
        return f"of {space.channels} channels at {describe_size(space.latent_size(self.resolution))}, {where}"


def load_text(
    model_args: ModelArguments,
    data_args: DataArguments,
    text_args: TextArguments,
    unet_config: Mapping[str, Any],
    seed: int,
    image_embeddings: ImageEmbeddings | None = None,
) -> tuple[torch.nn.Module | None, Any | None]:
    """
    Loads text encoder and tokenizer; two `None` without captions. Raises a `ValueError` if one of them cannot be read,
    or is incompatible with the other or the U-Net, which may attend to tokens of `image_embeddings` instead.
    """
    width, column = cross_attention_width(unet_config), text_args.caption_column
    if image_embeddings is not None:
        image_embeddings.check_text(column is not None, unet_config)
    needs_captions = width is not None and image_embeddings is None
    if (width is None and column is not None) or (needs_captions and column is None):
        raise ValueError(
            f"`caption_column` is {column!r}, but the U-Net has {'no ' if width is None else ''}cross-attention. "
            "Change the block types (`CrossAttnDownBlock2D` and such have it), or the argument."
        )
    if column is None:
        return None, None
    argument, source = "text_encoder_name_or_path", text_args.text_encoder_name_or_path
    hub = {"cache_dir": data_args.cache_dir}
    if source is None and text_args.text_encoder_config_name_or_path is None:
        argument, source = "pretrained_model_name_or_path", model_args.pretrained_model_name_or_path
        hub["revision"] = model_args.revision
        if source is None:
            raise ValueError(
                f"`caption_column` is {column!r}, but there is no text encoder. Pass `text_encoder_name_or_path`, or "
                "`text_encoder_config_name_or_path` and `tokenizer_name_or_path` to train one from scratch."
            )
    name = text_args.tokenizer_name_or_path
    if name is not None:
        tokenizer = load_tokenizer("tokenizer_name_or_path", name, cache_dir=data_args.cache_dir)
    else:
        tokenizer = load_tokenizer(argument, source, **hub)
    if source is None:
        text_encoder = build_text_encoder(text_args.text_encoder_config_name_or_path, tokenizer, seed)
    else:
        if argument == "pretrained_model_name_or_path":
            hub["variant"] = model_args.variant
        has_clip_text = image_embeddings is not None and image_embeddings.has_clip_text
        trained = text_args.train_text_encoder
        text_encoder = load_text_encoder(argument, source, trained=trained, with_projection=has_clip_text, **hub)
    check_text_encoder(text_encoder, tokenizer, unet_config, is_projected=image_embeddings is not None)
    return text_encoder, tokenizer


def prepare_captions(
    images: datasets.Dataset,
    tokenizer: Any,
    text_encoder: torch.nn.Module,
    text_args: TextArguments,
    unet_config: Mapping[str, Any],
    device: torch.device | str,
    cache_dir: str | None = None,
    has_clip_text: bool = False,
    is_streamed: bool = False,
) -> CaptionTokens | CaptionEmbeddings | StreamedCaptions:
    """
    Tokenizes the captions of the data, and encodes them if `precompute_text_embeddings` is set (`cache_dir` is for the
    embeddings); moves the text encoder to `device` (to the CPU if it is no longer needed there) and freezes it unless
    it is trained. `has_clip_text`: whether the text embedding is used, and the padding masked, as in Karlo.
    `is_streamed`: whether the images are only the first ones.
    """
    captions_class = StreamedCaptions if is_streamed else CaptionTokens
    tokens = captions_class(images["caption"][:], tokenizer, text_encoder, pads_to_max(text_encoder, unet_config))
    text_encoder.to(device)
    if text_args.train_text_encoder:
        freeze_unused_parameters(text_encoder, tokens, unet_config, uses_pooled=has_clip_text)
    else:
        text_encoder.requires_grad_(False).eval()
    if not text_args.precompute_text_embeddings or isinstance(tokens, StreamedCaptions):
        return tokens
    embeddings = CaptionEmbeddings(tokens, text_encoder, cache_dir, masks_padding=has_clip_text)
    text_encoder.to("cpu")  # from here on only validation images need it
    return embeddings


def caption_model_kwargs(
    batch: Mapping[str, torch.Tensor],
    captions: CaptionTokens | CaptionEmbeddings,
    empty_caption: Mapping[str, torch.Tensor],
    text_encoder: torch.nn.Module,
    text_args: TextArguments,
    unet_config: Mapping[str, Any],
) -> dict[str, Any]:
    """The former way to `TextCondition.for_training`, which it calls. Will be removed in 0.3."""
    warnings.warn(
        f"`caption_model_kwargs` is now `TextCondition.for_training`. It will be removed in {REMOVED_IN}.",
        FutureWarning,
        stacklevel=2,
    )
    dropout_prob = text_args.caption_dropout_prob
    text = TextCondition(unet_config, text_encoder, empty_caption=empty_caption, dropout_prob=dropout_prob)
    return text.for_training(batch).kwargs


def find_training_format(
    images: datasets.Dataset,
    channels: int | None,
    model_args: ModelArguments,
    data_args: DataArguments,
    keeps: str | None = None,
    latents: TrainedLatents | None = None,
    stored: StoredLatents | None = None,
) -> ImageFormat:
    """
    The format of the training images, logged; see `loading.training_image_format`. Raises a `ValueError` also for
    another one than that of a pretrained model, or an autoencoder, that stays as it is.

    Args:
        channels (`int`, *optional*): Of the network's images; `None`: those of the data.
        keeps (`str`, *optional*): Why the pretrained weights stay as they are.
        latents (`TrainedLatents`, *optional*): The autoencoder that encodes the images.
        stored (`StoredLatents`, *optional*): It encoded them before; their format is recorded, and was checked.
    """
    if stored is not None:
        return stored.image_format
    if latents is not None:
        known, channels = latents.image_format, latents.space.image_channels[0]
        keeps = "the autoencoder stays as it is"
    else:
        known = None if channels is None else pretrained_image_format(model_args, data_args, channels)
    image_format = training_image_format(images, channels, known, data_args)
    if keeps is not None and known is not None and image_format != known:
        raise ValueError(
            f"The training data are {image_format}, but the pretrained model was trained on {known}, and {keeps}. "
            "Leave `image_mode` and `value_range` out, or train all weights."
        )
    return image_format


def find_condition_format(
    images: datasets.Dataset,
    image_format: ImageFormat,
    condition: ControlImageKind | None,
    request: FormatRequest,
    num_proc: int | None = None,
    stored: StoredLatents | None = None,
) -> ImageFormat:
    """
    The format of conditioning images: of those that are made from the images, `condition`, see `condition_format_of`.
    Those of a column are as the `request` says; of a request of no channels, grey ones of 8 bits become RGB. Those next
    to `stored` latents are as they were encoded. Raises a `ValueError` for images that none can be made from, and for
    conditioning images that do not suit the request.
    """
    if stored is not None:
        return stored_condition_format(stored, request)
    if condition is not None:
        return condition_format_of(condition, image_format)
    try:
        found = find_image_format(images, request, num_proc=num_proc, column="conditioning_image")
    except ValueError as error:
        raise ValueError(f"Conditioning images: {error}") from error
    return ImageFormat() if request.channels is None and found == ImageFormat("L", 1) else found


def stored_condition_format(stored: StoredLatents, request: FormatRequest) -> ImageFormat:
    """The format of conditioning images next to stored latents. Raises a `ValueError` if another one is asked for."""
    found = stored.condition_format or ImageFormat()
    asked = (request.channels or found.channels, request.value_range or found.value_range, request.known or found)
    if asked != (found.channels, found.value_range, found):
        raise ValueError(
            f"The conditioning images next to the latents are {found}, but the ControlNet or `condition_value_range` "
            f"asks for {request.known or 'others'}. Encode the images again."
        )
    return found


def load_examples(
    data_args: DataArguments,
    stored: StoredLatents | None,
    caption_column: str | None,
    conditioning_image_column: str | None,
    tensor_columns: Mapping[str, str] | None,
    seed: int,
) -> tuple[datasets.Dataset, dict[int, str] | None]:
    """Loads the images of the data, or the latents that are `stored` for them, and the names of the classes."""
    columns: dict[str, Any] = {"caption_column": caption_column, "conditioning_image_column": conditioning_image_column}
    with embedding_columns_in_errors():
        if stored is None:
            return load_image_dataset(**data_args.source(), **columns, tensor_columns=tensor_columns, seed=seed)
        return load_latents(
            data_args.train_data_dir,
            stored,
            data_args.label_column,
            **columns,
            cache_dir=data_args.cache_dir,
            max_train_samples=data_args.max_train_samples,
            seed=seed,
            tensor_columns=tensor_columns,
        )


def open_training_stream(
    data_args: DataArguments,
    text_args: TextArguments,
    conditioning_image_column: str | None,
    tensor_columns: Mapping[str, str] | None,
) -> StreamSource:
    """The shards of a stream. Raises a `ValueError` for arguments that need all examples before the first step."""
    if text_args.precompute_text_embeddings:
        raise ValueError(
            "`precompute_text_embeddings` encodes all captions before the first step, and `streaming` does not read "
            "the data before. Drop one of them."
        )
    names = ("dataset_name", "dataset_config_name", "data_files", "split", "image_column", "label_column", "cache_dir")
    with embedding_columns_in_errors():
        return open_stream(
            **{name: getattr(data_args, name) for name in names},
            caption_column=text_args.caption_column,
            conditioning_image_column=conditioning_image_column,
            tensor_columns=tensor_columns,
            class_names=None if data_args.class_names is None else read_class_names(data_args.class_names),
        )


def fit_resolution(unet: AdaGNUNet2DModel, data_args: DataArguments, factor: int, stored: StoredLatents | None) -> Size:
    """
    The resolution of the images in pixels, `factor` times that of the samples, which the config of the U-Net gets.
    Raises a `ValueError` for one that the U-Net cannot take, or of other images than those of `stored` latents.
    """
    resolution = choose_resolution(data_args.size, unet.config, "U-Net", factor)
    if stored is not None:
        check_stored_resolution(stored, resolution, data_args.train_data_dir)
    unet.register_to_config(sample_size=as_sample_size([side // factor for side in as_size(resolution)]))
    return resolution


def check_examples(
    images: datasets.Dataset,
    data_args: DataArguments,
    stored: StoredLatents | None,
    resolution: Size,
    allow_unlabelled: bool,
    **image_options: Any,
) -> datasets.Dataset:
    """The usable ones of the images (see `check_images`, which takes `image_options`), or of `stored` latents."""
    num_proc = data_args.image_check_num_proc
    if stored is None and data_args.no_check_images:
        return keep_labelled(images) if not allow_unlabelled else images
    if stored is None:
        options = {"allow_unlabelled": allow_unlabelled, "num_proc": num_proc, **image_options}
        return check_images(images, resolution, **options)[0]
    return check_latents(images, stored, data_args.train_data_dir, allow_unlabelled, num_proc)


def log_continuous_bound(objective: Objective, image_format: ImageFormat, is_latent: bool) -> None:
    """Logs what the bound in the loss is for data that are not discrete."""
    if objective != "simple" and (is_latent or image_format.num_levels is None):
        what, scaled = ("latents", "scaled") if is_latent else ("data", "of values scaled to [-1, 1]")
        logger.info(
            f"The {what} are continuous, so the bound in the loss (`objective` {objective}) is that of their density, "
            f"{scaled}; it may be negative"
        )


def load_diffusion(
    accelerator: Accelerator,
    record: RunRecord,
    args: Sequence[Any],
    *,
    extra_channels: ExtraChannels | int = no_extra_channels,
    may_widen: bool = False,
    keeps: str | None = None,
    upsampler_args: Any = None,
    condition: ControlImageKind | None = None,
    condition_request: FormatRequest | None = None,
    conditioning_image_column: str | None = None,
    tensor_columns: Mapping[str, str] | None = None,
    translation: Any = None,
    only_pixels: str | None = None,
    needs_images: str | None = None,
    embedding_args: ImageEmbeddingArguments | None = None,
) -> Diffusion:
    """
    Loads noise schedule, networks and data of a run, checks that they are compatible with each other and with the
    checkpoint that is resumed, and fits the class embedding to the classes of the data. Cheap checks come first.

    Args:
        accelerator (`Accelerator`), record (`RunRecord`): From `start_run` and `parse_run`.
        args (sequence of dataclasses): Those of `DIFFUSION_ARGUMENTS`, in this order.
        extra_channels (callable or `int`, *optional*): Number of input channels of the U-Net in addition to those of
            the noisy image, or a function that gives it for the number of the latter.
        may_widen (`bool`, defaults to `False`): A pretrained U-Net without the extra channels gets them.
        keeps (`str`, *optional*): Why the pretrained weights stay as they are, for errors: what would need new ones is
            refused.
        upsampler_args (`SuperResolutionArguments`, *optional*): Of an upsampler. Upsampled images would train it to
            blur, so that images below the resolution are skipped.
        condition (`str`, *optional*): Kind of conditioning image to make from each image, for ControlNets.
        condition_request (`FormatRequest`, *optional*): What is asked of conditioning images in a column.
        conditioning_image_column (`str`, *optional*), tensor_columns (mapping, *optional*): As for
            `load_image_dataset`.
        translation (`ImageToImageArguments`, *optional*): Of image to image translation: they pair images, and tell the
            format of the source images and the channels that are concatenated.
        only_pixels (`str`, *optional*): Why autoencoders are refused, for errors.
        needs_images (`str`, *optional*): Why stored latents are refused, for errors.
        embedding_args (`ImageEmbeddingArguments`, *optional*): Of a decoder of unCLIP, if image embeddings are given.
    """
    model_args, data_args, diffusion_args, training_args, text_args = args
    seed, has_text = training_args.seed, text_args.caption_column is not None
    if translation is not None:
        data_args.refuse_streaming("sources and targets are paired in all data before the first step")
    if isinstance(extra_channels, int):
        extra_channels = functools.partial(constant_channels, extra_channels)
    noise_scheduler = build_scheduler(model_args, data_args, diffusion_args)
    record.check_noise(noise_scheduler)
    latents = load_latent_space(model_args, data_args, keeps, only_pixels)
    latent_space = None if latents is None else latents.space
    image_embeddings = None if embedding_args is None else load_image_embeddings(embedding_args, model_args, data_args)
    stored = find_latents(data_args, latents, condition, conditioning_image_column, needs_images, embedding_args)
    if upsampler_args is not None and latent_space is not None:
        # The low-resolution image is not encoded.
        extra_channels = functools.partial(constant_channels, latent_space.image_channels[0])
    spare, guides_image = None, False
    if translation is not None:
        spare = spare_channels(model_args, data_args, noise_scheduler)
        guides_image = translation.source_dropout_prob > 0
        extra_channels = functools.partial(constant_channels, spare or 0)
        conditioning_image_column = translation.column
    unet_config, channels = load_unet_config(model_args, data_args, noise_scheduler, extra_channels, may_widen)
    if keeps is not None and unet_config.get("in_channels", channels) != channels + extra_channels(channels):
        raise ValueError(
            f"The pretrained U-Net takes no masks, and {keeps}. Train all weights, or adapt a model that inpaints."
        )
    if latent_space is not None:
        leave_unclipped(noise_scheduler)
        check_latent_channels(latent_space, channels)
    is_pretrained = model_args.pretrained_model_name_or_path is not None
    if image_embeddings is not None:
        unet_config = image_embeddings.prepare_config(unet_config, is_pretrained)
        guides_image = image_embeddings.can_drop
        tensor_columns = {**(tensor_columns or {}), **image_embeddings.columns}
    check_sampling_steps(training_args, noise_scheduler, data_args.label_column is not None, has_text or guides_image)
    text_encoder, tokenizer = load_text(model_args, data_args, text_args, unet_config, seed, image_embeddings)
    stream = stream_order = None
    with accelerator.main_process_first():
        if data_args.streaming:
            stream = open_training_stream(data_args, text_args, conditioning_image_column, tensor_columns)
            images, id2label = stream.sample(), stream.id2label
        else:
            columns = (text_args.caption_column, conditioning_image_column)
            images, id2label = load_examples(data_args, stored, *columns, tensor_columns, seed)
        unchecked = stored is None and (data_args.streaming or data_args.no_check_images)
        embeds_width = None if image_embeddings is None else image_embeddings.read_width(images)
        if translation is not None:
            images = translation.pair(images, data_args.source())
        record.check_classes(id2label)
        if image_embeddings is not None:
            id2label = None  # labels are only for balancing: the embedding takes the place of a class
        num_classes = len(id2label) if id2label is not None else None
        image_format = find_training_format(images, channels, model_args, data_args, keeps, latents, stored)
        record.check_format(image_format)
        log_continuous_bound(diffusion_args.objective, image_format, is_latent=latent_space is not None)
        check_preview_channels(training_args.preview_channels, image_format)
        condition_format = None
        if translation is not None:
            known = pretrained_pipeline_config(model_args, data_args).get("source_format")
            condition_format = translation.find_source_format(
                images, image_format, spare, known, data_args.image_check_num_proc
            )
            record.check_format(condition_format, "source_format")
            extra_channels = functools.partial(constant_channels, condition_format.channels)
        elif condition is not None or conditioning_image_column is not None:
            request, num_proc = condition_request or FormatRequest(), data_args.image_check_num_proc
            condition_format = find_condition_format(images, image_format, condition, request, num_proc, stored)
            record.check_format(condition_format, "condition_format")
        sample_channels = image_format.channels if latent_space is None else latent_space.channels
        unet_config = set_channels(unet_config, sample_channels, noise_scheduler, extra_channels)
        # The same random numbers on every process, and in every run with this seed.
        torch.manual_seed(seed)
        has_image_embeds = image_embeddings is not None and image_embeddings.is_in_time
        unet = build_unet(model_args, data_args, unet_config, num_classes, has_image_embeds)
        if image_embeddings is not None:
            image_embeddings.build_projection(unet, embeds_width, text_encoder, is_pretrained, seed)
            image_embeddings.build_encoder(image_format, accelerator.device)
        names = id2label
        images, id2label = match_unet_classes(unet, images, id2label, model_args, data_args, keeps)
        if stream is not None and names is not None and id2label is not None:
            stream.rows_of_classes = match_names(names, id2label)
        record.check_rows(id2label)
        in_channels = sample_channels + extra_channels(sample_channels)
        if unet.config.in_channels < in_channels:
            widen_input(unet, in_channels)
        check_guidance(training_args, unet.config, num_classes, has_text or guides_image)
        factor = 1 if latent_space is None else latent_space.factor
        resolution = fit_resolution(unet, data_args, factor, stored)
        min_image_size: Size | None = data_args.min_image_size
        if upsampler_args is not None:
            upsampler_args.check(resolution, noise_scheduler, unet_config.get("time_cond_proj_dim"), factor)
            min_image_size = resolution if min_image_size is None else min_image_size
        allow_unlabelled = num_classes is None or unet.config.null_class_id is not None
        images = check_examples(
            images,
            data_args,
            stored,
            resolution,
            allow_unlabelled,
            min_image_size=min_image_size,
            output_dir=training_args.output_dir if accelerator.is_main_process and stream is None else None,
            id2label=id2label,
            image_format=image_format,
            condition_format=condition_format,
            condition_range_argument="--condition_value_range" if translation is None else "--source_value_range",
        )
        smallest, skips = None, None
        if unchecked:
            smallest = smallest_size(resolution, min_image_size)
            skips = begin_skip_report(accelerator, record, training_args.output_dir)
        captions = None
        if has_text:
            captions = prepare_captions(
                images,
                tokenizer,
                text_encoder,
                text_args,
                unet.config,
                accelerator.device,
                data_args.cache_dir,
                has_clip_text=image_embeddings is not None and image_embeddings.has_clip_text,
                is_streamed=stream is not None,
            )
    if latent_space is not None:
        latent_space.vae.to(accelerator.device)
    num_images = len(images) if stream is None else sum(stream.sizes)
    check_batch_fits(num_images, training_args.train_batch_size, accelerator.num_processes)
    if stream is None:
        record.check_data(num_images, images["caption"][:] if has_text else None, stored)
    else:
        stream.allow_unlabelled = allow_unlabelled
        num_workers = data_args.dataloader_num_workers
        stream_order = StreamOrder(
            stream.sizes,
            seed,
            training_args.train_batch_size,
            accelerator.num_processes,
            record.check_stream(stream.facts(), accelerator.num_processes, num_workers),
            data_args.shuffle_buffer_size or DEFAULT_BUFFER_SIZE,
        )
    num_timesteps = noise_scheduler.config.num_train_timesteps
    return Diffusion(
        args=CommonArguments(*args),
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        noise_scheduler=noise_scheduler,
        timestep_sampler=diffusion_args.build_timestep_sampler(num_timesteps),
        metrics=LossMetrics(num_timesteps, accelerator.device),
        images=images,
        captions=captions,
        id2label=id2label,
        num_classes=num_classes,
        resolution=resolution,
        image_format=image_format,
        condition=condition,
        condition_format=condition_format,
        latent_space=latent_space,
        autoencoder_hash=None if latents is None else latents.autoencoder_hash,
        stored_latents=stored,
        image_embeddings=image_embeddings,
        columns={"conditioning_image_column": conditioning_image_column, "tensor_columns": tensor_columns},
        min_image_size=min_image_size,
        device=accelerator.device,
        stream=stream,
        stream_order=stream_order,
        process_index=accelerator.process_index,
        smallest=smallest,
        skips=skips,
    )
