"""A CLIP of a training run, and its data: arguments, loading, validation and saving."""

from __future__ import annotations

import copy
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch.utils.data import DataLoader
from transformers import CLIPConfig, CLIPModel, PretrainedConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ..commands.arguments import arg
from ..commands.errors import did_you_mean
from ..conditioning.image_format import as_size
from ..conditioning.text import NO_MAX_LENGTH, max_prompt_length, tokenize
from ..data.captions import NumberedCaptions
from ..data.checks import check_batch_fits, check_images
from ..data.clip_models import load_clip
from ..data.columns import first_caption, load_image_dataset
from ..data.fingerprints import SAVED_KEYS
from ..data.images import ImageDataset
from ..data.labels import match_classes, renumber_labels
from ..data.repositories import reading
from ..data.text_encoders import load_tokenizer
from .arguments import (
    APPLIED,
    FREE,
    PROCESS,
    SOURCE,
    HeldOutDataArguments,
    ModelArguments,
    TrainingArguments,
    check_share,
)
from .augmentation import random_colors, random_motion
from .contrastive import retrieval_measures, zero_shot_measures
from .disk import write_whole
from .interruption import keep_to_parent
from .loading import usable_images
from .resume import RunRecord


logger = get_logger(__name__)

# Of images in models from scratch: [0, 1] becomes [-1, 1]. Published CLIPs have statistics of their own data.
IMAGE_MEAN = IMAGE_STD = (0.5, 0.5, 0.5)
# With this id, transformers pools at the highest token id of a text, as the first configs of CLIP need it.
LEGACY_EOS_TOKEN_ID = 2
MEASURES_NAME = "retrieval.json"
CLIP_PANELS = {
    "Contrastive loss": {"loss": "training batches", "validation_loss": "all held-out images"},
    "Held-out retrieval and zero-shot accuracy": {
        "validation_text_to_image_recall_at_1": "text to image, recall at 1",
        "validation_text_to_image_recall_at_5": "text to image, recall at 5",
        "validation_image_to_text_recall_at_5": "image to text, recall at 5",
        "validation_zero_shot_accuracy": "zero-shot accuracy",
    },
}


# 1. Arguments


@dataclass
class CLIPArguments(ModelArguments):
    """Where the weights and the tokenizer come from, and how the network runs."""

    tokenizer_name_or_path: str | None = arg(
        None,
        "Tokenizer, on the Hub or in a folder, or a pipeline's; none: that of the pretrained model.",
        resume=SOURCE,
    )

    def check_source(self) -> None:
        """Raises a `ValueError` unless exactly one source of the network is given, and one from scratch a tokenizer."""
        super().check_source()
        if self.model_config_name_or_path is not None and self.tokenizer_name_or_path is None:
            raise ValueError(
                "A CLIP from scratch (`model_config_name_or_path`) has no tokenizer. Pass `tokenizer_name_or_path`; "
                "`python -m diffusers_adm.data.tokenizer` makes one."
            )

    def apply_to(self, network: CLIPModel) -> None:
        """Sets gradient checkpointing and memory format of a network of transformers."""
        if self.gradient_checkpointing:
            network.gradient_checkpointing_enable()
        if self.channels_last:
            network.to(memory_format=torch.channels_last)


@dataclass
class CLIPDataArguments(HeldOutDataArguments):
    """Images with captions, and held-out ones for validation; labels only for zero-shot accuracy."""

    caption_column: str | None = arg(
        None,
        "Column of the captions: texts, or lists of which each epoch draws one text.",
        resume=PROCESS,
    )
    validation_caption_column: str | None = arg(
        None,
        "Column of the captions of the held-out images, of a list the first text; none: `caption_column`.",
        resume=FREE,
    )
    variant_pattern: str | None = arg(
        None,
        "Regular expression that is found in captions of variants, such as 'skin tone$'. Retrieval is then also "
        "measured without the held-out images of such captions.",
        resume=FREE,
    )
    zero_shot_template: str = arg(
        "{}", "Prompt for a class, with {} for its name, for zero-shot accuracy.", resume=FREE
    )
    random_zoom: float = arg(
        0.0, "Training images are zoomed by random factors, up to 1 + this value in or out.", resume=PROCESS
    )
    random_shift: float = arg(
        0.0, "Training images are moved at random, by up to this share of a side.", resume=PROCESS
    )
    random_rotation: float = arg(
        0.0, "Training images are rotated at random, by up to this many degrees in either direction.", resume=PROCESS
    )
    random_color: float = arg(
        0.0,
        "Brightness, contrast and saturation of training images are scaled by random factors from 1 minus to 1 plus "
        "this value.",
        resume=PROCESS,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("random_zoom", "random_shift", "random_color"):
            check_share(self, name)
        if not 0 <= self.random_rotation <= 180:
            raise ValueError(f"`random_rotation` is {self.random_rotation}; it must lie in [0, 180] degrees.")
        if self.image_mode not in (None, "RGB") or self.value_range is not None:
            raise ValueError(
                "A CLIP is trained on RGB images of 8 bits, to which other images are converted. Leave out "
                "`image_mode` and `value_range`."
            )
        if self.zero_shot_template.count("{}") != 1:
            raise ValueError(
                f"`zero_shot_template` is {self.zero_shot_template!r}; it must hold {{}} once, for the name of a class."
            )
        if self.variant_pattern is not None:
            try:
                re.compile(self.variant_pattern)
            except re.error as error:
                raise ValueError(
                    f"`variant_pattern` is {self.variant_pattern!r}, which is no regular expression: {error}."
                ) from error

    def check(self) -> None:
        """Raises a `ValueError` without captions, or for arguments of held-out images without these."""
        if self.caption_column is None:
            raise ValueError("A CLIP is trained on images with captions. Name their column with `--caption_column`.")
        for name in ("validation_caption_column", "variant_pattern"):
            if getattr(self, name) is not None and self.validation_source() is None:
                raise ValueError(
                    f"`{name}` was given without held-out images. Pass `validation_data_files` or `validation_split`, "
                    "or leave it out."
                )

    def source(self) -> dict[str, Any]:
        return super().source() | {"caption_column": self.caption_column}

    def validation_source(self) -> dict[str, Any] | None:
        source = super().validation_source()
        column = self.validation_caption_column or self.caption_column
        return None if source is None else source | {"caption_column": column}

    def augment(self, images: torch.Tensor) -> torch.Tensor:
        """The random changes of a training batch, from PyTorch's global generator."""
        images = random_motion(images, self.random_zoom, self.random_shift, self.random_rotation)
        return random_colors(images, self.random_color)


@dataclass
class CLIPTrainingArguments(TrainingArguments):
    """Training arguments of a CLIP."""

    output_dir: str = arg("clip", "Folder of the CLIP, checkpoints and curves.", resume=FREE)
    train_batch_size: int = arg(
        16, "Pairs per process and forward pass; those of all processes are contrasted with each other.", resume=PROCESS
    )
    adam_weight_decay: float = arg(
        0.0, "AdamW weight decay of all weights but gains, biases and the temperature.", resume=APPLIED
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_batch_size < 2:
            raise ValueError(
                f"`train_batch_size` is {self.train_batch_size}: the contrastive loss tells a pair from the others of "
                "its batch, and has nothing to learn from without any. Pass at least 2; CLIP gets better with hundreds."
            )


CLIP_ARGUMENTS = (CLIPArguments, CLIPDataArguments, CLIPTrainingArguments)


# 2. Loading


def _hub(model_args: CLIPArguments, data_args: CLIPDataArguments) -> dict[str, Any]:
    """Arguments of `from_pretrained` for the pretrained CLIP; transformers takes no revision of `None`."""
    return {"revision": model_args.revision or "main", "cache_dir": data_args.cache_dir}


def load_clip_config(model_args: CLIPArguments, data_args: CLIPDataArguments) -> dict[str, Any]:
    """
    Loads the config of a CLIP, before any data. Raises a `ValueError` if it is another model's, has no projection, or,
    for a CLIP from scratch, holds unknown keys.
    """
    pretrained, from_scratch = model_args.pretrained_model_name_or_path, model_args.model_config_name_or_path
    if pretrained is not None:
        with reading("pretrained_model_name_or_path", pretrained):
            settings, _ = PretrainedConfig.get_config_dict(pretrained, **_hub(model_args, data_args))
    else:
        with reading("model_config_name_or_path", from_scratch):
            if os.path.isfile(from_scratch):
                with open(from_scratch, encoding="utf-8") as file:
                    settings = json.load(file)
            else:
                settings, _ = PretrainedConfig.get_config_dict(from_scratch, cache_dir=data_args.cache_dir)
    source = pretrained or from_scratch
    kind = settings.get("model_type", "clip")
    if kind != "clip":
        raise ValueError(
            f"{source} is the config of a model of type {kind!r}; this script trains `CLIPModel` (type 'clip'), which "
            "has both towers and their projections."
        )
    if not settings.get("projection_dim") and (pretrained is None or "projection_dim" in settings):
        raise ValueError(
            f"The config {source} has no projection: `projection_dim` is {settings.get('projection_dim')}. Give the "
            "width of the embeddings that both towers are projected to, e.g. 192."
        )
    if pretrained is None:
        defaults = CLIPConfig()
        for part, known in (
            ("", defaults),
            ("text_config", defaults.text_config),
            ("vision_config", defaults.vision_config),
        ):
            # transformers would keep unknown keys as attributes that nothing reads.
            for key in settings.get(part, {}) if part else settings:
                if key not in SAVED_KEYS and not key.startswith("_") and not hasattr(known, key):
                    where = f" in `{part}`" if part else ""
                    hint = did_you_mean(key, list(known.to_dict()), 1)
                    raise ValueError(
                        f"The config {source} holds {key!r}{where}, which `{type(known).__name__}` does not take.{hint}"
                    )
    return settings


def complete_config(settings: Mapping[str, Any], tokenizer: Any) -> CLIPConfig:
    """
    The config of a CLIP from scratch: vocabulary, special tokens and length that it leaves out are those of the
    tokenizer. The towers get the width of the joint projection, with which they load on their own.
    """
    of_tokenizer = {"vocab_size": len(tokenizer)}
    of_tokenizer |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    if tokenizer.model_max_length < NO_MAX_LENGTH:
        of_tokenizer["max_position_embeddings"] = tokenizer.model_max_length
    width = {"projection_dim": settings["projection_dim"]}
    others = {key: value for key, value in settings.items() if key not in ("text_config", "vision_config", *SAVED_KEYS)}
    return CLIPConfig(
        text_config={**of_tokenizer, **settings.get("text_config", {}), **width},
        vision_config={**settings.get("vision_config", {}), **width},
        **others,
    )


def check_tokenizer(tokenizer: Any, config: Any) -> None:
    """
    Raises a `ValueError` for a tokenizer that the text tower of a CLIP cannot take: with more tokens than it has rows,
    without padding, or that does not end texts with the token at which the tower pools.
    """
    name = type(tokenizer).__name__
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"The tokenizer ({name}) has {len(tokenizer)} tokens, but `vocab_size` in the `text_config` is "
            f"{config.vocab_size}. Pass the tokenizer that the model was trained with, or give a model from scratch a "
            f"`vocab_size` of at least {len(tokenizer)} (left out, it is that of the tokenizer)."
        )
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer ({name}) has no {'padding' if tokenizer.pad_token_id is None else 'end'} token, which a "
            "CLIP needs. Give it one and save it; `python -m diffusers_adm.data.tokenizer` makes one with both."
        )
    ids, _ = tokenize(tokenizer, ["a", ""], max_length=config.max_position_embeddings, pad_to_max=True, warn=False)
    if not (ids == tokenizer.eos_token_id).any(dim=1).all():
        raise ValueError(
            f"The tokenizer ({name}) does not end texts with its end token {tokenizer.eos_token!r}, where CLIP's text "
            "tower pools. Use one that does; `python -m diffusers_adm.data.tokenizer` makes one."
        )
    if config.eos_token_id == LEGACY_EOS_TOKEN_ID:
        if tokenizer.eos_token_id != len(tokenizer) - 1:
            raise ValueError(
                f"`eos_token_id` in the `text_config` is {LEGACY_EOS_TOKEN_ID}, with which transformers pools at the "
                f"highest token id of a text, but the end token of the tokenizer has id {tokenizer.eos_token_id} of "
                f"{len(tokenizer)}. Use a tokenizer whose end token is another one than number {LEGACY_EOS_TOKEN_ID}, "
                "and name that in the config."
            )
    elif config.eos_token_id != tokenizer.eos_token_id:
        raise ValueError(
            f"`eos_token_id` in the `text_config` is {config.eos_token_id}, but the tokenizer ends texts with id "
            f"{tokenizer.eos_token_id}, so the text tower would not pool there. Pass the tokenizer that the model was "
            "trained with, or leave `eos_token_id` out of the config of a model from scratch."
        )


def choose_image_size(data_args: CLIPDataArguments, config: Any, is_pretrained: bool) -> int:
    """
    The side of the images of a vision tower, from its config or `resolution`. Raises a `ValueError` for a size that it
    cannot take.
    """
    size, side = data_args.size, config.image_size
    if config.num_channels != 3:
        raise ValueError(
            f"`num_channels` in the `vision_config` is {config.num_channels}; a CLIP is trained on RGB images, with 3."
        )
    if size is not None and as_size(size) != (side, side):
        if is_pretrained:
            raise ValueError(
                f"The resolution is {data_args.resolution}; the pretrained CLIP takes images of {side}x{side} pixels "
                f"(`image_size` in its `vision_config`). Leave `resolution` out, or pass {side}."
            )
        if len(set(as_size(size))) > 1:
            raise ValueError(f"The resolution is {data_args.resolution}; the images of a CLIP are square.")
        side = as_size(size)[0]
    if side % config.patch_size:
        raise ValueError(
            f"The images have {side}x{side} pixels, which `patch_size` {config.patch_size} in the `vision_config` does "
            "not divide. Pass another `resolution`, or change one of them in the config."
        )
    return side


def load_image_processor(model_args: CLIPArguments, data_args: CLIPDataArguments, side: int) -> CLIPImageProcessorPil:
    """The preprocessing of the pretrained CLIP, or that of one from scratch with images of `side`."""
    pretrained = model_args.pretrained_model_name_or_path
    if pretrained is None:
        square = {"height": side, "width": side}
        return CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size=square, image_mean=list(IMAGE_MEAN), image_std=list(IMAGE_STD)
        )
    with reading("pretrained_model_name_or_path", pretrained):
        return CLIPImageProcessorPil.from_pretrained(pretrained, **_hub(model_args, data_args))


@dataclass
class HeldOut:
    """Held-out images with one caption each."""

    images: ImageDataset
    captions: list[str]
    is_variant: torch.Tensor | None  # (num_images,), bool; None: no pattern was given

    @property
    def labels(self) -> list[int]:
        """The numbers of their classes, -1 for unlabelled ones; empty without labels."""
        return self.images.dataset["label"][:] if self.images.has_labels else []


@dataclass
class CLIPTraining:
    """A CLIP in training, and its data."""

    clip: CLIPModel
    tokenizer: Any
    image_processor: CLIPImageProcessorPil
    train_dataset: ImageDataset
    held_out: HeldOut | None
    class_prompts: list[str]  # by the number of the class; empty without labels

    def __post_init__(self) -> None:
        device = self.clip.device
        mean, std = (
            torch.tensor(value, device=device)[:, None, None]
            for value in (self.image_processor.image_mean, self.image_processor.image_std)
        )
        self._scale, self._shift = 0.5 / std, (0.5 - mean) / std

    def pixel_values(self, images: torch.Tensor) -> torch.Tensor:
        """What the vision tower takes, as the image processor makes it, from images in [-1, 1]."""
        return images * self._scale.to(images.device) + self._shift.to(images.device)

    def save(self, folder: str) -> None:
        """Saves the CLIP with its tokenizer and its preprocessing, so that transformers loads all from `folder`."""
        for part in (self.clip, self.tokenizer, self.image_processor):
            part.save_pretrained(folder)

    def validation_measures(self) -> list[str]:
        """The names of what `validate_clip` measures, as in the log, for `keep_best`."""
        if self.held_out is None:
            return []
        directions = ("text_to_image", "image_to_text")
        recalls = [f"{direction}_recall_at_{k}" for direction in directions for k in (1, 5)]
        names = ["loss", *recalls]
        if self.held_out.is_variant is not None:
            names += [f"without_variants_{name}" for name in recalls]
        if any(label >= 0 for label in self.held_out.labels):
            names += ["zero_shot_accuracy", "zero_shot_balanced_accuracy"]
        return [f"validation_{name}" for name in names]

    def describe(self) -> str:
        """The data in words."""
        captions, num_images = self.train_dataset.captions, len(self.train_dataset)
        return (
            f"{num_images} images with {len(captions.numbers) / num_images:.1f} captions each "
            f"({len(captions.texts) - 1} distinct ones), {len(self.held_out.images) if self.held_out else 0} held-out "
            "images"
        )


def load_clip_training(accelerator: Accelerator, record: RunRecord, args: Sequence[Any]) -> CLIPTraining:
    """
    Loads CLIP, tokenizer and data of a run, and checks that they are compatible with each other and with the checkpoint
    that is resumed. Cheap checks come first.

    Args:
        accelerator (`Accelerator`), record (`RunRecord`): From `start_run` and `parse_run`.
        args (sequence of dataclasses): Those of `CLIP_ARGUMENTS`, in this order.
    """
    model_args, data_args, training_args = args
    seed, pretrained = training_args.seed, model_args.pretrained_model_name_or_path
    settings = load_clip_config(model_args, data_args)
    with accelerator.main_process_first():
        named = "tokenizer_name_or_path" if model_args.tokenizer_name_or_path else "pretrained_model_name_or_path"
        revision = model_args.revision if named.startswith("pretrained") else None
        tokenizer = load_tokenizer(named, getattr(model_args, named), revision=revision, cache_dir=data_args.cache_dir)
        config = (
            CLIPConfig.from_dict(dict(settings)) if pretrained is not None else complete_config(settings, tokenizer)
        )
        check_tokenizer(tokenizer, config.text_config)
        side = choose_image_size(data_args, config.vision_config, pretrained is not None)
        config.vision_config.image_size = side
        image_processor = load_image_processor(model_args, data_args, side)
        if pretrained is not None:
            hub = _hub(model_args, data_args)
            clip = load_clip("pretrained_model_name_or_path", pretrained, variant=model_args.variant, **hub)
        else:
            # The same random numbers on every process, and in every run with this seed.
            torch.manual_seed(seed)
            clip = CLIPModel(config)
        images, id2label = load_image_dataset(**data_args.source(), seed=seed)
        images = with_captions(images, data_args.caption_column)
        usable: dict[str, Any] = {
            "min_image_size": data_args.min_image_size,
            "num_proc": data_args.image_check_num_proc,
        }
        output_dir = training_args.output_dir
        images, unchecked = usable_images(
            images, side, data_args, accelerator, record, output_dir, id2label=id2label, **usable
        )
        held_out = load_held_out(data_args, id2label, side, seed, usable)
    check_batch_fits(len(images), training_args.train_batch_size, accelerator.num_processes)
    record.check_data(len(images), images["caption"][:])
    record.check_network(_without_saved_keys(clip.config.to_dict()), side, {"tokenizer": tokenizer})
    captions = NumberedCaptions(images["caption"][:], tokenizer, clip.text_model, pad_to_max=False)
    train_dataset = ImageDataset(
        images,
        side,
        data_args.center_crop,
        data_args.random_flip,
        seed=seed,
        captions=captions,
        **unchecked,
    )
    prompts = [data_args.zero_shot_template.format(name) for name in (id2label or {}).values()]
    return CLIPTraining(clip, tokenizer, image_processor, train_dataset, held_out, prompts)


def with_captions(images: Any, column: str) -> Any:
    """Drops images without a caption, with a warning."""
    kept = [index for index, caption in enumerate(images["caption"][:]) if first_caption(caption)]
    if len(kept) < len(images):
        logger.warning(
            f"{len(images) - len(kept)} of {len(images)} images have no caption in the column {column!r} and are left "
            "out."
        )
        images = images.select(kept)
    return images


def load_held_out(
    data_args: CLIPDataArguments, id2label: Mapping[int, str] | None, side: int, seed: int, usable: Mapping[str, Any]
) -> HeldOut | None:
    """The held-out images, cropped at the centre; None if the arguments name none."""
    source = data_args.validation_source()
    if source is None:
        return None
    images, names = load_image_dataset(**source, seed=seed)
    if names is not None:
        images = renumber_labels(images, match_classes(names, id2label))
    images, _ = check_images(with_captions(images, source["caption_column"]), side, **usable)
    captions = [first_caption(caption) for caption in images["caption"][:]]
    is_variant = None
    if data_args.variant_pattern is not None:
        pattern = re.compile(data_args.variant_pattern)
        is_variant = torch.tensor([pattern.search(caption) is not None for caption in captions])
        if is_variant.all() or not is_variant.any():
            raise ValueError(
                f"`variant_pattern` is {data_args.variant_pattern!r}, which is found in "
                f"{'all' if is_variant.all() else 'none'} of the {len(captions)} held-out captions, such as "
                f"{captions[0]!r}. Pass one that some of them have, or leave it out."
            )
    images = ImageDataset(images, side, center_crop=True, seed=seed)
    return HeldOut(images, captions, is_variant)


def _without_saved_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config of transformers without the keys that say how it was saved, at any depth."""
    kept = {key: value for key, value in copy.deepcopy(dict(config)).items() if key not in SAVED_KEYS}
    return {key: _without_saved_keys(value) if isinstance(value, dict) else value for key, value in kept.items()}


# 3. Validation


@torch.no_grad()
def embed_images(training: CLIPTraining, images: ImageDataset, batch_size: int, num_workers: int) -> torch.Tensor:
    """Normalised embeddings of images, `(num_images, width)`, float32, on the CPU."""
    clip, embeds = training.clip, []
    for batch in DataLoader(images, batch_size, num_workers=num_workers, worker_init_fn=keep_to_parent):
        pixel_values = training.pixel_values(batch["images"].to(clip.device))
        embeds.append(clip.get_image_features(pixel_values=pixel_values).pooler_output.float().cpu())
    return F.normalize(torch.cat(embeds), dim=-1)


@torch.no_grad()
def embed_texts(training: CLIPTraining, texts: Sequence[str], batch_size: int) -> torch.Tensor:
    """Normalised embeddings of texts, `(num_texts, width)`, float32, on the CPU."""
    clip, embeds = training.clip, []
    max_length = max_prompt_length(training.tokenizer, clip.text_model)
    for start in range(0, len(texts), batch_size):
        part = list(texts[start : start + batch_size])
        ids, _ = tokenize(training.tokenizer, part, max_length=max_length, pad_to_max=False, warn=False)
        embeds.append(clip.get_text_features(input_ids=ids.to(clip.device)).pooler_output.float().cpu())
    return F.normalize(torch.cat(embeds), dim=-1)


def validate_clip(training: CLIPTraining, batch_size: int, num_workers: int) -> dict[str, float]:
    """
    Measures the CLIP on the held-out images, in the state in which it is: the contrastive loss with all of them as one
    batch, retrieval (again without variants, if there are some: `without_variants_...`), zero-shot accuracy.
    """
    held_out = training.held_out
    image_embeds = embed_images(training, held_out.images, batch_size, num_workers)
    text_embeds, text_of_image = _embed_distinct(training, held_out.captions, batch_size)
    logits = training.clip.logit_scale.detach().float().cpu().exp() * image_embeds @ text_embeds[text_of_image].T
    # As in `contrastive_loss`, an image and the same caption of another one are no negative pair.
    images = torch.arange(len(logits))
    is_no_pair = (text_of_image[:, None] == text_of_image) & (images[:, None] != images)
    logits = logits.masked_fill(is_no_pair, -math.inf)
    loss = (F.cross_entropy(logits, images) + F.cross_entropy(logits.T, images)) / 2
    values = {"loss": loss.item(), **retrieval_measures(image_embeds, text_embeds, text_of_image)}
    if held_out.is_variant is not None:
        kept = (~held_out.is_variant).nonzero()[:, 0]
        texts, of_image = text_of_image[kept].unique(return_inverse=True)
        without = retrieval_measures(image_embeds[kept], text_embeds[texts], of_image)
        values |= {f"without_variants_{name}": value for name, value in without.items()}
    labels = held_out.labels
    if any(label >= 0 for label in labels):
        class_embeds = embed_texts(training, training.class_prompts, batch_size)
        values |= zero_shot_measures(image_embeds, class_embeds, torch.tensor(labels))
    return values


def _embed_distinct(
    training: CLIPTraining, captions: Sequence[str], batch_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of the distinct captions, and the number of that of each image."""
    numbers = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    return embed_texts(training, list(numbers), batch_size), torch.tensor([numbers[caption] for caption in captions])


def write_measures(values: Mapping[str, float], held_out: HeldOut, output_dir: str, step: int) -> None:
    """Writes the measures of `validate_clip` into the folder of the run, for its model card."""
    without = 0 if held_out.is_variant is None else int((~held_out.is_variant).sum())
    record = {**values, "step": step, "num_images": len(held_out.captions), "num_images_without_variants": without}
    text = json.dumps(record | {"held_out": True}, indent=2)
    write_whole(Path(output_dir, MEASURES_NAME), text + "\n")


def describe_measures(values: Mapping[str, float], held_out: HeldOut) -> str:
    """The measures of `validate_clip` in a line of the log."""

    def recalls(prefix: str, count: int) -> str:
        parts = []
        for direction in ("text_to_image", "image_to_text"):
            at = [f"{prefix}{direction}_recall_at_{k}" for k in (1, 5)]
            numbers = [f"{values[name]:.1%} ({values[f'{name}_error']:.1%})" for name in at]
            parts.append(f"{direction.replace('_', ' ')} {' and '.join(numbers)}")
        return f"{', '.join(parts)} (chance {min(1, 5 / count):.1%} at 5)"

    count = len(held_out.captions)
    words = [f"loss {values['loss']:.3f}", f"recall at 1 and 5 (standard error): {recalls('', count)}"]
    if held_out.is_variant is not None:
        kept = int((~held_out.is_variant).sum())
        words.append(f"without variants, {kept} images: {recalls('without_variants_', kept)}")
    if "zero_shot_accuracy" in values:
        words.append(
            f"zero-shot accuracy {values['zero_shot_accuracy']:.1%}, balanced "
            f"{values['zero_shot_balanced_accuracy']:.1%}"
        )
    return f"{count} held-out images: " + "; ".join(words)
