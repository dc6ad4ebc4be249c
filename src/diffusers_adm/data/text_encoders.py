"""Text encoders and tokenizers: loaded from a repository, or built with random weights from a config."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from ..commands.errors import did_you_mean
from ..conditioning.text import NO_MAX_LENGTH, encode_captions, text_model_kwargs
from ..models.text_encoder_glide import GLIDETextModel
from .fingerprints import SAVED_KEYS
from .repositories import only_variant, reading
from .seeding import derive_seed


if TYPE_CHECKING:
    from .captions import CaptionTokens, StreamedCaptions


def text_encoder_class(config: Any, with_projection: bool = False) -> type[torch.nn.Module]:
    """
    Returns the class that gives one state per token for a config of transformers: `T5EncoderModel` instead of
    `T5Model`, `CLIPTextModel` for a whole CLIP, and `CLIPTextModelWithProjection` where the config names it, or for
    every CLIP `with_projection`.

    Raises:
        ValueError: If the model type has no text encoder.
    """
    if with_projection and config.model_type in ("clip", "clip_text_model"):
        return transformers.CLIPTextModelWithProjection
    name = (getattr(config, "architectures", None) or [""])[0]
    if name.endswith(("TextModel", "TextModelWithProjection", "EncoderModel")) and hasattr(transformers, name):
        return getattr(transformers, name)
    if config.model_type == "clip":
        return transformers.CLIPTextModel
    mapping = transformers.AutoModelForTextEncoding._model_mapping
    if type(config) not in mapping:
        raise ValueError(
            f"A model of type {config.model_type!r} is not a text encoder. Use one that transformers' "
            "`AutoModelForTextEncoding` knows: CLIP, T5, BERT, RoBERTa, DistilBERT and the like."
        )
    return mapping[type(config)]


def load_text_encoder(
    argument: str,
    name_or_path: str,
    *,
    trained: bool,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
    with_projection: bool = False,
) -> torch.nn.Module:
    """
    Loads a text encoder from the folder `text_encoder` of a pipeline, or from the root of a repository.

    Args:
        argument (`str`): The argument that holds `name_or_path`, for errors.
        name_or_path (`str`): A folder, or a repository on the Hub.
        trained (`bool`): Load float32 weights; otherwise the dtype that was saved (GLIDE's are always float32).
        revision, variant, cache_dir (`str`, *optional*): Arguments of `from_pretrained`. A folder with weights in
            float16 only is read without `variant="fp16"`, too.
        with_projection (`bool`, defaults to `False`): Load a CLIP's with the projection to its text embedding.

    Raises:
        ValueError: If there is none.
    """
    hub_kwargs = {"revision": revision or "main", "cache_dir": cache_dir}
    variant = variant or only_variant(name_or_path, "text_encoder")
    with reading(argument, name_or_path):
        settings, subfolder = _find_config(name_or_path, **hub_kwargs)
        hub_kwargs |= {"subfolder": subfolder}
        if _is_glide(settings):
            return GLIDETextModel.from_pretrained(name_or_path, variant=variant, **hub_kwargs)
        config = AutoConfig.from_pretrained(name_or_path, **hub_kwargs)
        encoder_class: Any = text_encoder_class(config, with_projection)
        dtype = torch.float32 if trained else "auto"
        if with_projection and config.model_type == "clip":
            # `CLIPModel` has one for both towers, next to theirs, which it ignores.
            config.text_config.projection_dim = config.projection_dim
            hub_kwargs["config"] = config.text_config
        return encoder_class.from_pretrained(name_or_path, variant=variant, dtype=dtype, **hub_kwargs)


def load_tokenizer(
    argument: str, name_or_path: str, *, revision: str | None = None, cache_dir: str | None = None
) -> Any:
    """
    Loads a tokenizer from the folder `tokenizer` of a pipeline, or from the root of a repository.

    Raises:
        ValueError: If there is none.
    """
    hub_kwargs = {"revision": revision or "main", "cache_dir": cache_dir}
    errors = []
    for subfolder in ("tokenizer", ""):
        try:
            return AutoTokenizer.from_pretrained(name_or_path, subfolder=subfolder, **hub_kwargs)
        except (OSError, ValueError) as error:
            errors.append(str(error))
    raise ValueError(
        f"`{argument}` is {name_or_path!r}, and neither its folder `tokenizer` nor its root holds a tokenizer that can "
        f"be read. The former: {errors[0]} The latter: {errors[1]}"
    )


def build_text_encoder(name_or_path: str, tokenizer: Any, seed: int) -> torch.nn.Module:
    """
    Builds a text encoder with random weights, which depend only on `seed`. It reseeds PyTorch's global generators.

    Args:
        name_or_path (`str`): A JSON file, or a repository that holds one: with `model_type` and arguments of that
            model's config in transformers, or with `"_class_name": "GLIDETextModel"` and its arguments. Omitted ones
            are those of the tokenizer: `vocab_size`, ids of special tokens, GLIDE's `max_position_embeddings`.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer of the captions.
        seed (`int`): The seed of the run.

    Raises:
        ValueError: If the config cannot be read, holds a key unknown to its model type, or is no text encoder's; if
            neither the config nor the tokenizer gives the length of GLIDE's captions.
    """
    with reading("text_encoder_config_name_or_path", name_or_path):
        if os.path.isfile(name_or_path):
            with open(name_or_path, encoding="utf-8") as file:
                settings = json.load(file)
        else:
            settings, _ = _find_config(name_or_path)
    given = {key: value for key, value in settings.items() if key not in SAVED_KEYS and not key.startswith("_")}
    if _is_glide(settings):
        # `from_config` would drop unknown keys.
        _check_keys(name_or_path, given, GLIDETextModel, inspect.signature(GLIDETextModel.__init__).parameters)
        given.setdefault("vocab_size", len(tokenizer))
        if given.setdefault("max_position_embeddings", tokenizer.model_max_length) >= NO_MAX_LENGTH:
            raise ValueError(
                f"The config {name_or_path} lacks `max_position_embeddings`, and the tokenizer sets no limit "
                "(`model_max_length`) either. Add the number of tokens that every caption is to be cut and padded to."
            )
        torch.manual_seed(derive_seed(seed, "text encoder"))
        return GLIDETextModel(**given)
    if "model_type" not in settings:
        raise ValueError(
            f"The config {name_or_path} does not say its `model_type`. Add it, e.g. `clip_text_model`, `t5` or `bert`; "
            'or `"_class_name": "GLIDETextModel"`.'
        )
    defaults = AutoConfig.for_model(settings["model_type"])
    # transformers would keep unknown keys as attributes that nothing reads.
    _check_keys(name_or_path, [key for key in given if not hasattr(defaults, key)], type(defaults), defaults.to_dict())
    # The defaults belong to the published model's vocabulary. CLIP pools at `eos_token_id`, T5 starts at padding.
    of_tokenizer = {"vocab_size": len(tokenizer)}
    of_tokenizer |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = AutoConfig.for_model(settings["model_type"], **{**of_tokenizer, **given})
    config.architectures = settings.get("architectures")
    torch.manual_seed(derive_seed(seed, "text encoder"))
    return text_encoder_class(config)(config)


def freeze_unused_parameters(
    text_encoder: torch.nn.Module,
    tokens: CaptionTokens | StreamedCaptions,
    unet_config: Mapping[str, Any],
    uses_pooled: bool = False,
) -> list[str]:
    """
    Freezes weights that do not affect the U-Net's input, such as BERT's pooler, unless the pooled text is used
    elsewhere: distributed training waits for the gradient of every weight that requires one. Returns their names.
    """
    empty = {name: value[None].to(next(text_encoder.parameters()).device) for name, value in tokens.empty.items()}
    conditioning = encode_captions(text_encoder, empty, pad_to_max=tokens.pad_to_max)
    inputs = text_model_kwargs(conditioning, unet_config)
    total = inputs["encoder_hidden_states"].sum()
    total = total + sum(value.sum() for value in inputs.get("added_cond_kwargs", {}).values())
    if uses_pooled:
        total = total + conditioning.pooled.sum()
    parameters = [(name, p) for name, p in text_encoder.named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad(total, [p for _, p in parameters], allow_unused=True)
    unused = [(name, p) for (name, p), gradient in zip(parameters, gradients, strict=True) if gradient is None]
    for _, parameter in unused:
        parameter.requires_grad_(False)
    return [name for name, _ in unused]


def _is_glide(config: Mapping[str, Any]) -> bool:
    return config.get("_class_name") == GLIDETextModel.__name__


def _find_config(name_or_path: str, **hub_kwargs: Any) -> tuple[dict[str, Any], str]:
    """Finds a text encoder's config in the folder `text_encoder` of a repository, or in its root; returns both."""
    errors = []
    for subfolder in ("text_encoder", ""):
        try:
            config, _ = PretrainedConfig.get_config_dict(name_or_path, subfolder=subfolder, **hub_kwargs)
        except OSError as error:
            errors.append(error)
            continue
        if "model_type" in config or _is_glide(config):  # a folder without a config gives an empty one
            return config, subfolder
    raise errors[0] if errors else OSError("neither its root nor its folder `text_encoder` holds a text encoder.")


def _check_keys(name_or_path: str, keys: Iterable[str], config_class: type, known: Iterable[str]) -> None:
    known = list(known)
    for key in keys:
        if key not in known:
            problem = f"The config {name_or_path} holds {key!r}, which `{config_class.__name__}` does not take."
            raise ValueError(problem + did_you_mean(key, known, 1))
