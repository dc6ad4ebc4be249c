"""The two towers of a CLIP, from a folder or a repository: images to embeddings, captions to embeddings and states."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    PretrainedConfig,
)

from ..ops.finiteness import explain_weights
from .fingerprints import hash_config, hash_plain, hash_tensors
from .repositories import only_variant, reading
from .text_encoders import load_tokenizer


# Where the towers are in a repository: in the root of a CLIP, or in folders of pipelines.
VISION_FOLDERS, TEXT_FOLDERS = ("", "image_encoder"), ("", "prior_text_encoder", "text_encoder")
PROCESSOR_FOLDERS = ("", "feature_extractor", "image_encoder")
# Next to the weights of a `CLIPModel`: its preprocessing, and its tokenizer, of whichever kind.
CLIP_FILES = ("preprocessor_config.json", "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json")
CLIP_FILES += ("vocab.json", "merges.txt", "added_tokens.json")
# Settings of an image processor that change the pixels; the others depend on the version of transformers.
PIXEL_SETTINGS = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor")
PIXEL_SETTINGS += ("do_normalize", "image_mean", "image_std")


class ClipVision(NamedTuple):
    """The vision tower of a CLIP, frozen and in float32, and its image processor."""

    model: CLIPVisionModelWithProjection
    processor: Any

    @property
    def width(self) -> int:
        """Width of the image embeddings."""
        return self.model.config.projection_dim

    def pixel_values(self, images: Image.Image | list[Image.Image]) -> torch.Tensor:
        """8-bit RGB images as the tower takes them: resized, cropped and normalised, `(batch_size, 3, size, size)`."""
        return self.processor(images, return_tensors="pt")["pixel_values"]

    @torch.no_grad()
    def embed(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The embeddings `(batch_size, width)` of `pixel_values`: projections, which are not normalised."""
        return self.model(pixel_values=pixel_values.to(self.model.device)).image_embeds


class ClipText(NamedTuple):
    """The text tower of a CLIP, frozen and in float32, and its tokenizer."""

    model: CLIPTextModelWithProjection
    tokenizer: Any


def load_clip_vision(
    argument: str, name: str, *, revision: str | None = None, cache_dir: str | None = None
) -> ClipVision:
    """
    Loads the vision tower of a CLIP and its image processor, from the root of a repository, or from the folders
    `image_encoder` and `feature_extractor` of a pipeline.

    Args:
        argument (`str`): The argument that holds `name`, for errors.
        name (`str`): A folder, or a repository on the Hub.
        revision, cache_dir (`str`, *optional*): Arguments of `from_pretrained`.

    Raises:
        ValueError: If there is none, it has no projection, or its weights are not finite.
    """
    from transformers import CLIPImageProcessor  # without torchvision, transformers warns when this name is imported

    hub = {"revision": revision or "main", "cache_dir": cache_dir}
    model = _load_tower(argument, name, CLIPVisionModelWithProjection, VISION_FOLDERS, hub)
    errors = []
    for subfolder in PROCESSOR_FOLDERS:
        try:
            processor = CLIPImageProcessor.from_pretrained(name, subfolder=subfolder, **hub)
        except (OSError, ValueError) as error:
            errors.append(error)
            continue
        return ClipVision(model, processor)
    raise ValueError(
        f"`{argument}` is {name!r}, which holds no `preprocessor_config.json`, so it is not known how its images are "
        f"resized and normalised: {errors[0]} Save the `CLIPImageProcessor` that it was trained with next to it."
    )


def load_clip_text(argument: str, name: str, *, revision: str | None = None, cache_dir: str | None = None) -> ClipText:
    """
    Loads the text tower of a CLIP and its tokenizer, from the root of a repository, or from the folders of a pipeline;
    see `load_clip_vision`.
    """
    hub = {"revision": revision or "main", "cache_dir": cache_dir}
    model = _load_tower(argument, name, CLIPTextModelWithProjection, TEXT_FOLDERS, hub)
    return ClipText(model, load_tokenizer(argument, name, revision=revision, cache_dir=cache_dir))


def load_clip(
    argument: str, name: str, *, revision: str | None = None, variant: str | None = None, cache_dir: str | None = None
) -> CLIPModel:
    """Loads both towers of a CLIP, in float32, to train them; for the arguments see `load_clip_vision`."""
    hub = {"revision": revision or "main", "variant": variant, "cache_dir": cache_dir}
    with reading(argument, name):
        model, loading = CLIPModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True, **hub)
    _check_weights(argument, name, model, loading["missing_keys"], "`CLIPModel`")
    return model


def hash_clip_vision(vision: ClipVision) -> str:
    """Hashes what the embeddings of images depend on: config and weights of the tower, and the image processor."""
    settings = {key: vision.processor.to_dict().get(key) for key in PIXEL_SETTINGS}
    parts = [hash_config(vision.model), hash_tensors(vision.model.state_dict()), settings]
    return hash_plain(parts)


def _load_tower(argument: str, name: str, tower: type, folders: tuple[str, ...], hub: dict[str, Any]) -> Any:
    kind = "vision" if tower is CLIPVisionModelWithProjection else "text"
    if os.path.isfile(name):
        raise ValueError(f"`{argument}` is {name!r}, which is a file. Name the folder of the CLIP.")
    with reading(argument, name):
        found = _find_model_type(name, folders, hub)
        if found is None:
            raise ValueError(
                f"`{argument}` is {name!r}, which holds no config of a CLIP. Name a folder or repository of "
                f"`CLIPModel` or `{tower.__name__}`."
            )
        model_type, subfolder = found
        if model_type not in ("clip", f"clip_{kind}_model"):
            raise ValueError(
                f"`{argument}` {name!r} holds a model of type {model_type!r}, not a CLIP with a {kind} tower. Name a "
                f"folder or repository of `CLIPModel` or `{tower.__name__}`."
            )
        config = tower.config_class.from_pretrained(name, subfolder=subfolder, **hub)  # type: ignore[attr-defined]
        if model_type == "clip":
            # `CLIPModel` has one for both towers, next to theirs, which `CLIPModel` ignores.
            config.projection_dim = CLIPConfig.from_pretrained(name, subfolder=subfolder, **hub).projection_dim
        model, loading = tower.from_pretrained(  # type: ignore[attr-defined]
            name,
            config=config,
            subfolder=subfolder,
            variant=only_variant(name, subfolder),
            dtype=torch.float32,
            output_loading_info=True,
            **hub,
        )
    _check_weights(argument, name, model, loading["missing_keys"], f"`CLIPModel` or `{tower.__name__}`")
    return model.requires_grad_(False).eval()


def _check_weights(argument: str, name: str, model: torch.nn.Module, missing: Iterable[str], classes: str) -> None:
    """
    Raises a `ValueError` for weights that are missing, which transformers would fill with random numbers, and only log
    it, or not finite. `classes` have projections, for errors.
    """
    missing = sorted(missing)
    projections = [key for key in missing if "projection" in key]
    if projections:
        kind = "text" if projections[0].startswith("text") else "vision"
        raise ValueError(
            f"`{argument}` {name!r} holds no weights of the {kind} tower's projection (`{projections[0]}`), without "
            f"which it gives no embeddings. Name a CLIP with projections: {classes}."
        )
    if missing:
        raise ValueError(f"`{argument}` {name!r} lacks weights of a CLIP, such as `{missing[0]}`.")
    wrong = explain_weights(argument, model)
    if wrong is not None:
        raise ValueError(wrong)


def _find_model_type(name: str, folders: tuple[str, ...], hub: dict[str, Any]) -> tuple[str, str] | None:
    """The `model_type` of the first folder with a config, and this folder; `None` if no folder has one."""
    errors = []
    for subfolder in folders:
        try:
            config, _ = PretrainedConfig.get_config_dict(name, subfolder=subfolder, **hub)
        except OSError as error:
            errors.append(error)
            continue
        if "model_type" in config:  # a folder without a config gives an empty one
            return config["model_type"], subfolder
    if errors:
        raise errors[0]
    return None
