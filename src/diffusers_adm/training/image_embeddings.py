"""
The image embeddings of a decoder of unCLIP in training (Ramesh et al. 2022, https://huggingface.co/papers/2204.06125,
section 2.1): where they come from, how they reach the U-Net, and validation images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline
from PIL import Image

from ..conditioning.image_embedding import check_projection
from ..conditioning.image_format import ImageFormat
from ..conditioning.previews import describe_preview, preview
from ..conditioning.text import cross_attention_width
from ..data.clip_models import ClipVision, load_clip_vision
from ..data.embeddings import check_embeddings, embedding_columns
from ..data.seeding import derive_seed
from ..models.unclip_projection import UnCLIPProjectionModel
from ..models.unet_2d_adagn import AdaGNUNet2DModel
from .arguments import DataArguments, DiffusionTrainingArguments, ImageEmbeddingArguments, ModelArguments
from .images import cell_scale, labelled_grid
from .loading import load_pretrained, pretrained_part, pretrained_pipeline_config
from .unets import replace_class_embedding
from .validation import Example, generate


if TYPE_CHECKING:
    import datasets  # of the `train` extra


logger = get_logger(__name__)

PROJECTION_NAME = "image_projection"  # the component of a pipeline
DEFAULT_TOKENS = 4  # of the paper
# Components of a pretrained pipeline that the result of a decoder does not have.
PARTS_OF_A_PRIOR = ("prior", "prior_text_encoder", "super_res_first")
# Below this mean cosine similarity, stored embeddings are those of another CLIP: of unrelated ones it is about 0.
MIN_AGREEMENT = 0.5
# Modes of `torch.nn.functional.interpolate` by Pillow's numbers of filters.
RESAMPLING = {0: "nearest", 2: "bilinear", 3: "bicubic"}


# 1. Encoding the images of a batch


class BatchEncoder:
    """
    Encodes images by the vision tower of a CLIP, which get the size and the normalisation of its image processor on
    their device. Pillow resizes the images of an image processor; the results differ by rounding errors of 8 bits.

    Args:
        vision (`ClipVision`): The vision tower and its image processor.
        image_format (`ImageFormat`): Format of the images, grey or colours; alpha is composited over white.

    Raises:
        ValueError: For images without colours, and an image processor with another filter than nearest, bilinear and
            bicubic, or without a size.
    """

    def __init__(self, vision: ClipVision, image_format: ImageFormat):
        settings = vision.processor.to_dict()
        self.vision, self.image_format = vision, image_format
        if not image_format.is_viewable:
            raise ValueError(
                f"The images are {image_format}, and a CLIP encodes 8-bit colours. Pass embeddings of them that you "
                "made as `--image_embeds_column`."
            )
        self.mode = RESAMPLING.get(int(settings.get("resample", 3)))
        if self.mode is None:
            raise ValueError(
                f"The image processor of the CLIP resizes with Pillow's filter {settings['resample']}; set `resample` "
                f"in its `preprocessor_config.json` to one of {sorted(RESAMPLING)}."
            )
        self.size = _size_of(settings.get("size")) if settings.get("do_resize", True) else None
        self.crop_size = _size_of(settings.get("crop_size")) if settings.get("do_center_crop", True) else None
        self.scale = 255 * settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 255.0
        has_norm = settings.get("do_normalize", True)
        mean, std = (
            settings[name] if has_norm else default for name, default in (("image_mean", [0.0]), ("image_std", [1.0]))
        )
        self.mean, self.std = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))

    def pixel_values(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(batch_size, channels, height, width)` in [-1, 1] as the vision tower takes them."""
        pixels = (images.float() / 2 + 0.5).clamp(0, 1)
        if self.image_format.mode in ("LA", "RGBA"):
            alpha = pixels[:, -1:]
            pixels = pixels[:, :-1] * alpha + 1 - alpha
        pixels = _to_eight_bits(pixels).expand(-1, 3, -1, -1)
        height, width = pixels.shape[-2:]
        if self.size is not None:
            size = self.size
            if isinstance(size, int):  # of the shorter edge
                factor = size / min(height, width)
                size = (size, int(factor * width)) if height <= width else (int(factor * height), size)
            # One side after the other, each rounded to 8 bits, as Pillow does.
            for step in ((height, size[1]), size):
                pixels = _resize(pixels, step, self.mode)
        if self.crop_size is not None:
            pixels = _crop(pixels, self.crop_size if isinstance(self.crop_size, tuple) else (self.crop_size,) * 2)
        return (pixels * self.scale - self.mean.to(pixels)) / self.std.to(pixels)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """The embeddings `(batch_size, width)`, float32, of images in [-1, 1]."""
        return self.vision.embed(self.pixel_values(images)).float()


def _states_width(text_encoder: torch.nn.Module) -> int:
    config: Any = text_encoder.config
    return config.hidden_size


def _size_of(size: Mapping[str, int] | int | None) -> int | tuple[int, int]:
    """A size in the settings of an image processor: height and width, or that of the shorter edge."""
    if isinstance(size, int):
        return size
    if size and size.get("shortest_edge") is not None:
        return size["shortest_edge"]
    if size and size.get("height") is not None and size.get("width") is not None:
        return size["height"], size["width"]
    raise ValueError(
        f"The image processor of the CLIP has the size {size}; its `preprocessor_config.json` must name "
        "`shortest_edge`, or `height` and `width`."
    )


def _to_eight_bits(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels * 255).round().clamp(0, 255) / 255


def _resize(pixels: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    if tuple(pixels.shape[-2:]) == size:
        return pixels
    antialias = {"antialias": True, "align_corners": False} if mode != "nearest" else {}
    return _to_eight_bits(F.interpolate(pixels, size=size, mode=mode, **antialias))


def _crop(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The centre of images; black around smaller ones, as image processors do."""
    for dim, wanted in zip((-2, -1), size, strict=True):
        length = pixels.shape[dim]
        if length < wanted:
            before = math.ceil((wanted - length) / 2)
            padding = (before, wanted - length - before)
            pixels = F.pad(pixels, (0, 0, *padding) if dim == -2 else padding)
        else:
            pixels = pixels.narrow(dim, (length - wanted) // 2, wanted)
    return pixels


# 2. What a run trains on


@dataclass
class ImageEmbeddings:
    """
    The image embeddings of a run.

    Attributes:
        args (`ImageEmbeddingArguments`): The arguments of the run.
        columns (`dict[str, str]`): Columns of the data that hold them, by their names in the examples; empty if they
            are encoded in the loop.
        vision (`ClipVision`, *optional*): The CLIP that makes them.
        pretrained (`UnCLIPProjectionModel`, *optional*): That of the pretrained decoder.
        projection (`UnCLIPProjectionModel`): The one to train, after `build_projection`.
        encoder (`BatchEncoder`, *optional*): Encodes the images of a batch, after `build_encoder`.
    """

    args: ImageEmbeddingArguments
    columns: dict[str, str]
    vision: ClipVision | None
    pretrained: UnCLIPProjectionModel | None
    projection: UnCLIPProjectionModel | None = None
    encoder: BatchEncoder | None = field(default=None, repr=False)

    @property
    def is_in_time(self) -> bool:
        """Whether the embedding is added to that of the timestep."""
        if self.pretrained is not None:
            return self.pretrained.config.time_embed_dim is not None
        return self.args.image_embeds_in_time is not False

    @property
    def has_clip_text(self) -> bool:
        """Whether the text is that of a CLIP with its embedding."""
        if self.pretrained is not None:
            return self.pretrained.config.text_conditioning == "clip"
        return self.args.text_conditioning == "clip"

    @property
    def can_drop(self) -> bool:
        """Whether images can be guided away from the learned embedding."""
        return self.args.dropout_prob > 0

    def prepare_config(self, unet_config: dict[str, Any], is_pretrained: bool) -> dict[str, Any]:
        """The config of the U-Net with an input for the embedding. Raises a `ValueError` for one that has no place."""
        kind, num_classes = unet_config.get("class_embed_type"), unet_config.get("num_class_embeds")
        if not self.is_in_time:
            if kind == "identity":
                raise ValueError(
                    "`image_embeds_in_time` is False, but the U-Net has `class_embed_type='identity'`, which takes a "
                    "vector that is added to the embedding of the timestep. Set `class_embed_type` in its config to "
                    "null, or leave `image_embeds_in_time` out."
                )
            return unet_config
        has_table = num_classes is not None and not is_pretrained  # that of a pretrained one is replaced
        if kind not in (None, "identity") or has_table:
            raise ValueError(
                f"The U-Net has `class_embed_type={kind!r}` and `num_class_embeds={num_classes}`, but the image "
                "embedding is added to that of the timestep in the place of a class. Set `class_embed_type` in its "
                'config to "identity" and leave `num_class_embeds` out, or pass `--image_embeds_in_time false`.'
            )
        return unet_config if is_pretrained else {**unet_config, "class_embed_type": "identity"}

    def check_text(self, has_captions: bool, unet_config: Mapping[str, Any]) -> None:
        """
        Raises a `ValueError` if the U-Net has nothing to attend to, or if captions are missing. `has_captions`: whether
        the data has them.
        """
        width = cross_attention_width(unet_config)
        if not has_captions and unet_config.get("addition_embed_type") == "text_embeds":
            raise ValueError(
                "`caption_column` is missing, but the U-Net adds a pooled text to its embedding of the timestep "
                "(`addition_embed_type='text_embeds'`). Pass it; with `--caption_dropout_prob 1` no caption is used."
            )
        if self.pretrained is not None:
            kind = self.pretrained.config.text_conditioning
            if has_captions != (kind is not None):
                raise ValueError(
                    f"The pretrained decoder has `text_conditioning={kind!r}`, but `caption_column` is "
                    f"{'given' if has_captions else 'missing'}. {'Pass it' if kind else 'Leave it out'}."
                )
            return
        tokens = self.args.num_image_tokens
        if width is None and tokens:
            raise ValueError(
                f"`num_image_tokens` is {tokens}, but the U-Net has no cross-attention for them. Change its block "
                "types (`CrossAttnDownBlock2D` and such have it), or pass `--num_image_tokens 0`."
            )
        if width is None and not self.is_in_time:
            raise ValueError(
                "`image_embeds_in_time` is False, and the U-Net has no cross-attention for tokens of the image "
                "embedding. Leave `image_embeds_in_time` out, or change the block types."
            )
        if width is not None and tokens == 0 and not has_captions:
            raise ValueError(
                "`num_image_tokens` is 0 and `caption_column` is missing, so that the U-Net's cross-attention has "
                "nothing to attend to. Pass one of them, or use a U-Net without cross-attention."
            )

    def read_width(self, images: datasets.Dataset) -> int:
        """Width of the embeddings of the data. Raises a `ValueError` for wrong ones, or those of another width."""
        width = check_embeddings(images, self.columns) if self.columns else self.vision.width
        if self.vision is not None and width != self.vision.width:
            raise ValueError(
                f"The embeddings in the column {self.args.image_embeds_column!r} have {width} numbers, but those of "
                f"the CLIP have {self.vision.width}. Encode the images with this CLIP, or pass theirs as "
                "`--image_encoder_name_or_path`."
            )
        if self.pretrained is not None and width != self.pretrained.config.clip_embeddings_dim:
            raise ValueError(
                f"The image embeddings have {width} numbers, but the pretrained decoder takes "
                f"{self.pretrained.config.clip_embeddings_dim}. Use the CLIP that it was trained with."
            )
        return width

    def build_projection(
        self, unet: AdaGNUNet2DModel, width: int, text_encoder: torch.nn.Module | None, is_pretrained: bool, seed: int
    ) -> None:
        """
        Builds the projection, or takes the pretrained one, and gives the U-Net the input for it, in place. Reseeds
        PyTorch's global generators.

        A model that was no decoder keeps its embedding of the timestep at first: the weights of the new layer are 0,
        and its bias is the null class of the model.

        Args:
            width (`int`): Width of the embeddings.
            text_encoder (`torch.nn.Module`, *optional*): That of the captions.
            is_pretrained (`bool`): Whether the U-Net is.
        """
        null_class = replace_class_embedding(unet) if self.is_in_time else None
        states_width = cross_attention_width(unet.config)
        if self.pretrained is not None:
            self.projection = self.pretrained
        else:
            tokens = DEFAULT_TOKENS if self.args.num_image_tokens is None else self.args.num_image_tokens
            text_width = None if text_encoder is None else _states_width(text_encoder)
            kind = None if text_encoder is None else self.args.text_conditioning or "states"
            torch.manual_seed(derive_seed(seed, "image projection"))
            self.projection = UnCLIPProjectionModel(
                clip_extra_context_tokens=0 if states_width is None else tokens,
                clip_embeddings_dim=width,
                time_embed_dim=unet.time_embed_dim if self.is_in_time else None,
                cross_attention_dim=states_width,
                text_conditioning=kind,
                text_states_dim=None if text_width == (width if kind == "clip" else states_width) else text_width,
            )
            layer = self.projection.clip_image_embeddings_project_to_time_embeddings
            if is_pretrained and layer is not None:
                torch.nn.init.zeros_(layer.weight)
                torch.nn.init.zeros_(layer.bias)
                if null_class is not None:
                    layer.bias.data.copy_(null_class)
        config = self.projection.config
        check_projection(config, unet.config)
        if text_encoder is not None:
            wanted, given = self.projection.states_width, _states_width(text_encoder)
            if given != wanted:
                raise ValueError(
                    f"The text encoder gives states of width {given}, but the pretrained decoder takes {wanted}. Use "
                    "the text encoder that it was trained with."
                )
        if self.has_clip_text:
            pooled = getattr(text_encoder.config, "projection_dim", None)
            if pooled != width:
                raise ValueError(
                    f"`text_conditioning` is 'clip', but the text encoder gives embeddings of {pooled} numbers and the "
                    f"image embeddings have {width}. Use the text encoder of the same CLIP."
                )

    def build_encoder(self, image_format: ImageFormat, device: torch.device | str) -> None:
        """Prepares encoding in the loop, on `device`, unless the data holds the embeddings."""
        if self.vision is not None and (not self.columns or image_format.is_viewable):
            self.encoder = BatchEncoder(self.vision, image_format)
        if not self.columns:
            self.vision.model.to(device)

    def complete(self, examples: Sequence[Example]) -> None:
        """
        Adds `image_embeds` to examples that lack them, in place. Raises a `ValueError` if those of the data are not
        those of the CLIP.
        """
        if self.encoder is None or not examples:
            return
        images = torch.stack([tensors["images"] for tensors, _ in examples])
        encoded = self.encoder(images.to(self.vision.model.device)).cpu()
        if not self.columns:
            for (tensors, _), embedding in zip(examples, encoded, strict=True):
                tensors["image_embeds"] = embedding
            return
        stored = torch.stack([tensors["image_embeds"] for tensors, _ in examples])
        agreement = F.cosine_similarity(stored, encoded).mean().item()
        if not agreement >= MIN_AGREEMENT:
            raise ValueError(
                f"The embeddings in the column {self.args.image_embeds_column!r} are not those of the CLIP: their mean "
                f"cosine similarity on {len(examples)} images is {agreement:.2f}. Pass the CLIP that made them as "
                "`--image_encoder_name_or_path`."
            )

    def components(self) -> dict[str, Any]:
        """Components of the pipeline."""
        return {
            PROJECTION_NAME: self.projection,
            "image_encoder": None if self.vision is None else self.vision.model,
            "feature_extractor": None if self.vision is None else self.vision.processor,
        }

    def describe(self) -> str:
        """The embeddings in words."""
        width = self.projection.config.clip_embeddings_dim
        return f", image embeddings of {width} numbers, {'read from disk' if self.columns else 'encoded in the loop'}"


def load_image_embeddings(
    args: ImageEmbeddingArguments, model_args: ModelArguments, data_args: DataArguments
) -> ImageEmbeddings | None:
    """
    Loads the CLIP and the pretrained projection of a decoder; `None` if none is trained. Raises a `ValueError` if one
    of them cannot be read, or for an argument that contradicts a pretrained decoder.
    """
    if not args.are_given:
        return None
    index, name = pretrained_pipeline_config(model_args, data_args), model_args.pretrained_model_name_or_path
    pretrained = vision = None
    if pretrained_part(index, PROJECTION_NAME) is not None:
        load = UnCLIPProjectionModel.from_pretrained
        pretrained = load_pretrained(load, PROJECTION_NAME, model_args, data_args, variant=model_args.variant)
        config = pretrained.config
        for argument, value in (
            ("num_image_tokens", config.clip_extra_context_tokens),
            ("image_embeds_in_time", config.time_embed_dim is not None),
            ("text_conditioning", config.text_conditioning),
        ):
            given = getattr(args, argument)
            if given is not None and given != value:
                raise ValueError(
                    f"`{argument}` is {given!r}, but the pretrained decoder {name} has {value!r}. Leave it out."
                )
    left_out = [part for part in PARTS_OF_A_PRIOR if pretrained_part(index, part) is not None]
    if left_out:
        logger.warning(
            f"The result will hold the decoder only, and not {', '.join(f'`{part}`' for part in left_out)} of {name}. "
            "Pass them to `ADMUnCLIPPipeline.from_pretrained` when you load it."
        )
    hub = {"cache_dir": data_args.cache_dir}
    if args.image_encoder_name_or_path is not None:
        vision = load_clip_vision("image_encoder_name_or_path", args.image_encoder_name_or_path, **hub)
    elif pretrained_part(index, "image_encoder") is not None:
        hub["revision"] = model_args.revision
        vision = load_clip_vision("pretrained_model_name_or_path", name, **hub)
    return ImageEmbeddings(args, embedding_columns(args.image_embeds_column, data_args.random_flip), vision, pretrained)


# 3. Validation


def variation_grid(
    pipeline: DiffusionPipeline, examples: Sequence[Example], training_args: DiffusionTrainingArguments
) -> Image.Image:
    """
    One row per example: the image, and an image that its embedding is decoded to. With captions, also an image by
    embedding and caption, and one by the caption only.
    """
    image_format, channels = pipeline.image_format, training_args.preview_channels
    with torch.no_grad():
        learned = pipeline.image_projection.null_image_embeds(1)[0].float().cpu()
    columns = {"image": preview(torch.stack([tensors["images"] for tensors, _ in examples]), image_format, channels)}
    embeds, prompts = (
        [tensors["image_embeds"] for tensors, _ in examples],
        [given.get("prompt") for _, given in examples],
    )
    wanted = {"variation": [{"image_embeds": each} for each in embeds]}
    if pipeline.image_projection.config.text_conditioning is not None:
        wanted["and caption"] = [
            {"image_embeds": each, "prompt": prompt} for each, prompt in zip(embeds, prompts, strict=True)
        ]
        wanted["caption"] = [{"image_embeds": learned, "prompt": prompt} for prompt in prompts]
    for label, arguments in wanted.items():
        columns[label] = generate(pipeline, arguments, training_args)
    cells = [cell for row in zip(*columns.values(), strict=True) for cell in row]
    return labelled_grid(
        cells,
        len(examples),
        len(columns),
        row_labels=None if prompts[0] is None else prompts,
        col_labels=list(columns),
        scale=cell_scale(cells),
        caption=describe_preview(image_format, channels),
    )


def num_shown(training_args: DiffusionTrainingArguments, has_captions: bool) -> int:
    """Number of examples in the validation images of a decoder, each with one sample a column."""
    return math.ceil(training_args.num_validation_images / (3 if has_captions else 1))
