"""
Captions for the training scripts: the encoder that reads them, their token numbers, and their embeddings.

`load_text_encoder` and `build_text_encoder` give the encoder, `load_tokenizer` its tokenizer. `CaptionTokens` and
`CaptionEmbeddings` hold one caption an example, as numbers of tokens or encoded; either goes to `ImageDataset`, whose
examples then carry the tensors that `TextCondition` reads.
"""

from __future__ import annotations

import difflib
import inspect
import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from ..conditioning.text import (
    NO_MAX_LENGTH,
    cut_off,
    encode_captions,
    max_prompt_length,
    text_model_kwargs,
    tokenize,
)
from ..models.text_encoder_glide import GLIDETextModel
from .fingerprints import SAVED_KEYS, hash_config, hash_plain, hash_tensors
from .repositories import reading
from .seeding import derive_seed


logger = logging.getLogger(__name__)

EMPTY_CAPTION = 0  # the number of "" among the distinct captions
ENCODING_BATCH_SIZE = 64  # captions
# Bump when what `CaptionEmbeddings` stores changes: caches of older versions are then not used.
EMBEDDINGS_VERSION = 1


# 1. Text encoder and tokenizer


def text_encoder_class(config: Any) -> type[torch.nn.Module]:
    """
    The class that gives one state a token for a config of transformers: `T5EncoderModel` instead of `T5Model`,
    `CLIPTextModel` for a whole CLIP, and `CLIPTextModelWithProjection` where the config names it.

    Raises:
        ValueError: If the model type has no text encoder.
    """
    name = (getattr(config, "architectures", None) or [""])[0]
    if name.endswith(("TextModel", "TextModelWithProjection", "EncoderModel")) and hasattr(transformers, name):
        return getattr(transformers, name)
    if config.model_type == "clip":
        return transformers.CLIPTextModel
    mapping = transformers.AutoModelForTextEncoding._model_mapping
    if type(config) not in mapping:
        raise ValueError(
            f"A model of type {config.model_type!r} is no text encoder. Take one that transformers' "
            "`AutoModelForTextEncoding` knows: CLIP, T5, BERT, RoBERTa, DistilBERT and the like."
        )
    return mapping[type(config)]


def _is_glide(config: Mapping[str, Any]) -> bool:
    return config.get("_class_name") == GLIDETextModel.__name__


def _find_config(name_or_path: str, **hub_kwargs: Any) -> tuple[dict[str, Any], str]:
    """A text encoder's config in the folder `text_encoder` of a repository, or in its root; and which."""
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


def load_text_encoder(
    argument: str,
    name_or_path: str,
    *,
    trained: bool,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
) -> torch.nn.Module:
    """
    Reads a text encoder from the root of a repository, or from the folder `text_encoder` in that of a pipeline.

    Args:
        argument (`str`): What gave `name_or_path`, for errors.
        name_or_path (`str`): A folder, or a repository on the Hub.
        trained (`bool`): Then its weights are float32; otherwise as they were saved, but GLIDE's float32 as well.
        revision, variant, cache_dir (`str`, *optional*): As of `from_pretrained`.

    Raises:
        ValueError: If there is none.
    """
    hub_kwargs = {"revision": revision or "main", "cache_dir": cache_dir}
    with reading(argument, name_or_path):
        settings, subfolder = _find_config(name_or_path, **hub_kwargs)
        if _is_glide(settings):
            return GLIDETextModel.from_pretrained(name_or_path, subfolder=subfolder, variant=variant, **hub_kwargs)
        config = AutoConfig.from_pretrained(name_or_path, subfolder=subfolder, **hub_kwargs)
        return text_encoder_class(config).from_pretrained(  # type: ignore[attr-defined]
            name_or_path,
            subfolder=subfolder,
            variant=variant,
            dtype=torch.float32 if trained else "auto",
            **hub_kwargs,
        )


def load_tokenizer(
    argument: str, name_or_path: str, *, revision: str | None = None, cache_dir: str | None = None
) -> Any:
    """
    Reads a tokenizer from the root of a repository, or from the folder `tokenizer` in that of a pipeline.

    Raises:
        ValueError: If there is none.
    """
    errors = []
    for subfolder in ("tokenizer", ""):
        try:
            return AutoTokenizer.from_pretrained(
                name_or_path, subfolder=subfolder, revision=revision or "main", cache_dir=cache_dir
            )
        except (OSError, ValueError) as error:
            errors.append(str(error))
    raise ValueError(
        f"`{argument}` is {name_or_path!r}, and neither its folder `tokenizer` nor its root holds a tokenizer that can "
        f"be read. The former: {errors[0]} The latter: {errors[1]}"
    )


def build_text_encoder(name_or_path: str, tokenizer: Any, seed: int) -> torch.nn.Module:
    """
    A text encoder with random weights, which depend on `seed` alone. It reseeds PyTorch's global generators.

    Args:
        name_or_path (`str`): A JSON file, or a repository that holds one: with `model_type` and arguments of that
            model's config in transformers, or with `"_class_name": "GLIDETextModel"` and arguments of that. Where it
            leaves them out, `vocab_size` and the numbers of special tokens (or GLIDE's `max_position_embeddings`) are
            those of the tokenizer.
        tokenizer (`PreTrainedTokenizerBase`): Whose tokens it is to read.
        seed (`int`): The seed of the run.

    Raises:
        ValueError: If the config cannot be read, holds a key unknown to its model type, or is no text encoder's; if the
            length of GLIDE's captions is neither in the config nor in the tokenizer.
    """
    with reading("text_encoder_config_name_or_path", name_or_path):
        if os.path.isfile(name_or_path):
            with open(name_or_path, encoding="utf-8") as file:
                try:
                    settings = json.load(file)
                except ValueError as error:
                    raise ValueError(
                        f"`text_encoder_config_name_or_path` {name_or_path!r} is not valid JSON: {error}"
                    ) from error
        else:
            settings, _ = _find_config(name_or_path)
    if _is_glide(settings):
        return _build_glide(name_or_path, settings, tokenizer, seed)
    if "model_type" not in settings:
        raise ValueError(
            f"The config {name_or_path} does not say its `model_type`. Add it, e.g. `clip_text_model`, `t5` or `bert`; "
            'or `"_class_name": "GLIDETextModel"`.'
        )
    defaults = AutoConfig.for_model(settings["model_type"])
    for key in settings:
        # transformers would keep it as an attribute that nothing reads.
        if not hasattr(defaults, key) and key not in SAVED_KEYS and not key.startswith("_"):
            raise _unknown_key(name_or_path, key, type(defaults).__name__, list(defaults.to_dict()))
    # The defaults belong to the published model's vocabulary. CLIP pools at `eos_token_id`, T5 starts at padding.
    of_tokenizer = {"vocab_size": len(tokenizer)}
    of_tokenizer |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    given = {key: value for key, value in settings.items() if key not in SAVED_KEYS}
    config = AutoConfig.for_model(settings["model_type"], **{**of_tokenizer, **given})
    config.architectures = settings.get("architectures")
    torch.manual_seed(derive_seed(seed, "text encoder"))
    return text_encoder_class(config)(config)


def _build_glide(name_or_path: str, settings: Mapping[str, Any], tokenizer: Any, seed: int) -> GLIDETextModel:
    arguments = list(inspect.signature(GLIDETextModel.__init__).parameters)
    given = {key: value for key, value in settings.items() if not key.startswith("_")}
    for key in given:
        if key not in arguments:  # `from_config` would drop it
            raise _unknown_key(name_or_path, key, GLIDETextModel.__name__, arguments)
    given.setdefault("vocab_size", len(tokenizer))
    if given.setdefault("max_position_embeddings", tokenizer.model_max_length) >= NO_MAX_LENGTH:
        raise ValueError(
            f"The config {name_or_path} leaves out `max_position_embeddings`, and the tokenizer sets no limit "
            "(`model_max_length`) either. Add the number of tokens that every caption is to be cut and padded to."
        )
    torch.manual_seed(derive_seed(seed, "text encoder"))
    return GLIDETextModel(**given)


def _unknown_key(name_or_path: str, key: str, class_name: str, known: list[str]) -> ValueError:
    close = difflib.get_close_matches(key, known, n=1)
    hint = f" Did you mean `{close[0]}`?" if close else ""
    return ValueError(f"The config {name_or_path} holds {key!r}, which `{class_name}` has not.{hint}")


def freeze_unused_parameters(
    text_encoder: torch.nn.Module, tokens: CaptionTokens, unet_config: Mapping[str, Any]
) -> list[str]:
    """
    Turns gradients off for weights that the U-Net's input does not depend on, such as BERT's pooler: distributed
    training waits for the gradient of each weight that has them on. Returns their names.
    """
    empty = {name: value[None].to(next(text_encoder.parameters()).device) for name, value in tokens.empty.items()}
    conditioning = encode_captions(text_encoder, empty, pad_to_max=tokens.pad_to_max)
    read = text_model_kwargs(conditioning, unet_config)
    total = read["encoder_hidden_states"].sum()
    total = total + sum(value.sum() for value in read.get("added_cond_kwargs", {}).values())
    parameters = [(name, p) for name, p in text_encoder.named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad(total, [p for _, p in parameters], allow_unused=True)
    unused = [(name, p) for (name, p), gradient in zip(parameters, gradients, strict=True) if gradient is None]
    for _, parameter in unused:
        parameter.requires_grad_(False)
    return [name for name, _ in unused]


# 2. One caption an example


class Captions:
    """
    The captions of a dataset, each distinct one held once.

    Args:
        captions (sequence of `str`): One an example, in the order of the dataset; "" where there is none.
    """

    def __init__(self, captions: Sequence[str]):
        self.texts = list(dict.fromkeys(["", *captions]))  # "" is number `EMPTY_CAPTION`
        numbers = {text: number for number, text in enumerate(self.texts)}
        self.numbers = torch.tensor([numbers[caption] for caption in captions])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """What the caption of an example adds to it."""
        return self.distinct(int(self.numbers[index]))

    def distinct(self, number: int) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    @property
    def empty(self) -> dict[str, torch.Tensor]:
        """The caption "", which stands for "no caption"."""
        return self.distinct(EMPTY_CAPTION)


class CaptionTokens(Captions):
    """
    Captions as numbers of tokens, all padded to one length. An example gets `input_ids` and `caption_mask`, int64 of
    shape `(length,)`.

    Args:
        captions (sequence of `str`): One an example.
        tokenizer, text_encoder: They limit the length; the number of captions that were cut is logged.
        pad_to_max (`bool`): See `diffusers_adm.conditioning.text.pads_to_max`.
    """

    def __init__(self, captions: Sequence[str], tokenizer: Any, text_encoder: torch.nn.Module, pad_to_max: bool):
        super().__init__(captions)
        self.pad_to_max = pad_to_max
        max_length = max_prompt_length(tokenizer, text_encoder)
        lost = cut_off(tokenizer, self.texts, max_length)
        if lost:
            text, rest = next(iter(lost.items()))
            logger.warning(
                f"{len(lost)} of {len(self.texts)} distinct captions have more than {max_length} tokens and are cut. "
                f"The first: {text!r}, of which this is not read: {rest!r}"
            )
        ids, mask = tokenize(tokenizer, self.texts, max_length=max_length, pad_to_max=pad_to_max, warn=False)
        self.input_ids, self.attention_mask = ids.int(), mask.bool()  # (distinct captions, length)

    def distinct(self, number: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.input_ids[number].long(), "caption_mask": self.attention_mask[number].long()}


class CaptionEmbeddings(Captions):
    """
    Encoded captions, on disk: an example gets `caption_states` of shape `(length, width)`, for pooling encoders
    `caption_pooled` of shape `(width,)`, both float32, and `caption_mask` where padding is masked.

    Each distinct caption is encoded once. The result is kept by `datasets` beside its other caches, under a name made
    from the weights of the encoder and the tokens, so that later runs, and the other processes of this one, read it.

    Args:
        tokens (`CaptionTokens`): The captions.
        text_encoder (`torch.nn.Module`): In evaluation mode, on the device to encode on.
        cache_dir (`str`, *optional*): In place of the cache folder of `datasets`.
    """

    def __init__(self, tokens: CaptionTokens, text_encoder: torch.nn.Module, cache_dir: str | None = None):
        import datasets

        self.texts, self.numbers, self.pad_to_max = tokens.texts, tokens.numbers, tokens.pad_to_max
        self.length = tokens.input_ids.shape[1]
        device = next(text_encoder.parameters()).device
        with torch.no_grad():
            empty = {name: value[None].to(device) for name, value in tokens.empty.items()}
            example = encode_captions(text_encoder, empty, pad_to_max=self.pad_to_max)
        features = {"states": datasets.Array2D((None, example.hidden_states.shape[-1]), "float32")}
        if example.pooled is not None:
            features["pooled"] = datasets.List(datasets.Value("float32"), length=example.pooled.shape[-1])

        def encode(numbers: list[int]) -> dict[str, Any]:
            batch = {name: torch.stack([tokens.distinct(i)[name] for i in numbers]).to(device) for name in empty}
            with torch.no_grad():
                encoded = encode_captions(text_encoder, batch, pad_to_max=self.pad_to_max)
            # What is masked is never read, so it is not stored either.
            masks = [slice(None)] * len(numbers) if encoded.attention_mask is None else encoded.attention_mask.bool()
            rows = {"states": [states[m].cpu().numpy() for states, m in zip(encoded.hidden_states, masks, strict=True)]}
            return rows if encoded.pooled is None else {**rows, "pooled": encoded.pooled.cpu().numpy()}

        fingerprint = self._fingerprint(tokens, text_encoder)
        folder = cache_dir or str(datasets.config.HF_DATASETS_CACHE)
        os.makedirs(folder, exist_ok=True)
        self.dataset = datasets.Dataset.from_dict({"number": list(range(len(self.texts)))}).map(
            encode,
            input_columns="number",
            remove_columns="number",
            batched=True,
            batch_size=ENCODING_BATCH_SIZE,
            features=datasets.Features(features),
            cache_file_name=os.path.join(folder, f"caption-embeddings-{fingerprint}.arrow"),
            new_fingerprint=fingerprint,
            desc="Encoding captions",
        )
        self.dataset.set_format("numpy")

    @staticmethod
    def _fingerprint(tokens: CaptionTokens, text_encoder: torch.nn.Module) -> str:
        inputs = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}
        parts = (hash_config(text_encoder), hash_tensors(text_encoder.state_dict()), hash_tensors(inputs))
        versions = (EMBEDDINGS_VERSION, torch.__version__, transformers.__version__)
        return hash_plain([*versions, tokens.pad_to_max, *parts])

    def distinct(self, number: int) -> dict[str, torch.Tensor]:
        row = self.dataset[number]
        stored = torch.tensor(row["states"])
        states = stored.new_zeros(self.length, stored.shape[1])
        states[: len(stored)] = stored
        result = {"caption_states": states}
        if not self.pad_to_max:
            result["caption_mask"] = (torch.arange(self.length) < len(stored)).long()
        if "pooled" in row:
            result["caption_pooled"] = torch.tensor(row["pooled"])
        return result
