"""
Encoded captions and prompts for U-Nets with cross-attention, padded in the same way in training and sampling.

There are two kinds of text encoders. CLIP's (https://huggingface.co/papers/2103.00020, as Stable Diffusion uses it),
GLIDE's (https://huggingface.co/papers/2112.10741) and that of latent diffusion
(https://huggingface.co/papers/2112.10752), or the U-Nets on top of them, were trained with every caption padded
to one fixed length and attend to the padding: the U-Net gets no mask. For all others (T5, BERT, ...) captions are
padded to the longest one of a batch, and encoder and U-Net get a mask that hides the padding. In both cases the
encoding of a caption does not depend on the others in its batch.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .condition import Condition, PreparedCondition, SamplingCall, UNetInputs


logger = logging.getLogger(__name__)

# A tokenizer keeps truncation and padding as a state of its own, which each call sets: two threads would fail, or mix
# their settings up.
_TOKENIZER_LOCK = threading.Lock()
# If neither tokenizer nor encoder names a limit. T5, which needs none, was trained with this many tokens.
DEFAULT_MAX_LENGTH = 512
# Encoders that were trained without a mask, by the start of their `model_type`: CLIP's, which is causal, and latent
# diffusion's `LDMBertModel`.
MASKLESS_ENCODERS = ("clip", "ldmbert")
# From here on a tokenizer's limit is none: transformers writes "no limit" as a number like 1e30.
NO_MAX_LENGTH = 1_000_000
# Default of `UNet2DConditionModel`, for configs that leave it out.
DEFAULT_CROSS_ATTENTION_DIM = 1280


Prompts = str | Sequence[str] | None


class TextConditioning(NamedTuple):
    """
    Encoded captions.

    Attributes:
        hidden_states (`torch.Tensor` of shape `(batch_size, length, width)`): One state a token.
        attention_mask (`torch.Tensor` of shape `(batch_size, length)`, *optional*): 1 for the tokens that
            cross-attention attends to, 0 for padding; `None`: it attends to all.
        pooled (`torch.Tensor` of shape `(batch_size, pooled_width)`, *optional*): One vector a caption, where the
            encoder gives one.
    """

    hidden_states: torch.Tensor
    attention_mask: torch.Tensor | None
    pooled: torch.Tensor | None


def _is_maskless(text_encoder: torch.nn.Module) -> bool:
    return str(getattr(text_encoder.config, "model_type", "")).startswith(MASKLESS_ENCODERS)


def pads_to_max(text_encoder: torch.nn.Module, unet_config: Mapping[str, Any]) -> bool:
    """
    Whether captions are padded to `max_prompt_length` and the padding is not masked: for CLIP, for latent diffusion's
    encoder (`LDMBertModel`), for encoders with the attribute `attends_to_padding`, and if the U-Net pools or normalises
    over all states, which a mask does not affect (`addition_embed_type="text"`, `cross_attention_norm="group_norm"`;
    DeepFloyd IF has both).
    """
    reads_padding = _is_maskless(text_encoder) or getattr(text_encoder, "attends_to_padding", False)
    mixes_states = unet_config.get("cross_attention_norm") == "group_norm"
    return reads_padding or mixes_states or unet_config.get("addition_embed_type") == "text"


def max_prompt_length(tokenizer: Any, text_encoder: torch.nn.Module) -> int:
    """
    Number of tokens, special ones included, that both can take. Encoders with the attribute `attends_to_padding` take
    captions of one length only, which is then the result.
    """
    limits = [getattr(text_encoder.config, "max_position_embeddings", None)]
    if limits == [None] or not getattr(text_encoder, "attends_to_padding", False):
        limits.append(tokenizer.model_max_length)
    known = [limit for limit in limits if limit is not None and 0 < limit < NO_MAX_LENGTH]
    return min(known, default=DEFAULT_MAX_LENGTH)


def tokenize(
    tokenizer: Any, prompts: Sequence[str], *, max_length: int, pad_to_max: bool, warn: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Tokenizes captions.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): A tokenizer of transformers, with a padding token.
        prompts (sequence of `str`): Captions; they may be empty.
        max_length (`int`): Number of tokens, special ones included, after which a caption is cut.
        pad_to_max (`bool`): Pad to `max_length`; else to the longest of these captions.
        warn (`bool`, defaults to `True`): Log what each over-long caption loses.

    Returns:
        `tuple` of two `torch.LongTensor` of shape `(len(prompts), length)`, `length` being at least 1: Token ids, and a
        mask that is 1 for tokens and 0 for padding; all 0 for a caption without any tokens, such as the empty one of a
        tokenizer without special tokens.

    Raises:
        ValueError: If the tokenizer has no padding token.
    """
    if getattr(tokenizer, "pad_token_id", 0) is None:
        raise ValueError(
            f"`tokenizer` ({type(tokenizer).__name__}) has no padding token, so captions of different lengths cannot "
            "share a batch. Give it one, e.g. `tokenizer.pad_token = tokenizer.eos_token`, and save it."
        )
    for prompt, lost in cut_off(tokenizer, prompts, max_length).items() if warn else ():
        logger.warning(f"The prompt {prompt!r} has more than {max_length} tokens; this part of it is cut off: {lost!r}")
    with _TOKENIZER_LOCK:
        encoded = tokenizer(
            list(prompts),
            padding="max_length" if pad_to_max else "longest",
            # Overrides the tokenizer's setting: on the left, padding would move the words to other positions.
            padding_side="right",
            truncation=True,
            max_length=max_length,
            return_attention_mask=True,
        )
    input_ids = torch.tensor(encoded["input_ids"], dtype=torch.long)
    attention_mask = torch.tensor(encoded["attention_mask"], dtype=torch.long)
    if input_ids.shape[1] == 0:  # empty captions, and a tokenizer without special tokens
        input_ids = torch.full((len(prompts), 1), tokenizer.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
    return input_ids, attention_mask


def cut_off(tokenizer: Any, prompts: Sequence[str], max_length: int) -> dict[str, str]:
    """The end of each caption that has more than `max_length` tokens, by the caption."""
    room = max_length - tokenizer.num_special_tokens_to_add()
    # Tokenized without special tokens, which would appear in the decoded rest. `verbose` would warn without the text.
    with _TOKENIZER_LOCK:
        lengths = tokenizer(list(prompts), add_special_tokens=False, verbose=False)["input_ids"]
    return {
        prompt: tokenizer.decode(ids[room:]) for prompt, ids in zip(prompts, lengths, strict=True) if len(ids) > room
    }


def encode_tokens(
    text_encoder: torch.nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    pad_to_max: bool,
    masks_padding: bool = False,
) -> TextConditioning:
    r"""
    Runs the text encoder. Gradients flow.

    Args:
        text_encoder (`torch.nn.Module`): An encoder of transformers, or one that returns `(hidden_states, pooled)`;
            also wrapped for distributed training.
        input_ids, attention_mask (`torch.LongTensor` of shape `(batch_size, length)`): From [`tokenize`].
        pad_to_max (`bool`): As given to [`tokenize`]; if set, cross-attention attends to the padding as well.
        masks_padding (`bool`, defaults to `False`): Hides the padding from cross-attention all the same (unCLIP).
    """
    unwrapped = getattr(text_encoder, "module", text_encoder)
    if not getattr(unwrapped, "attends_to_padding", False):
        # Attention to nothing is undefined, so the first padding of an empty caption is not masked.
        is_empty = attention_mask.sum(dim=1, keepdim=True) == 0
        attention_mask = torch.cat([attention_mask[:, :1] | is_empty, attention_mask[:, 1:]], dim=1)
    # Stable Diffusion passes one only on request.
    passes_mask = not _is_maskless(unwrapped) or getattr(unwrapped.config, "use_attention_mask", False)
    output = text_encoder(input_ids, attention_mask=attention_mask if passes_mask else None)
    if isinstance(output, tuple):
        hidden_states, pooled = output
    else:
        hidden_states = output.last_hidden_state
        pooled = output.get("text_embeds", output.get("pooler_output"))
    return TextConditioning(hidden_states, None if pad_to_max and not masks_padding else attention_mask, pooled)


def encode_captions(
    text_encoder: torch.nn.Module,
    batch: Mapping[str, torch.Tensor],
    *,
    pad_to_max: bool,
    masks_padding: bool = False,
) -> TextConditioning:
    """
    Encodes the `input_ids` and `caption_mask` of a batch for training; gradients flow. The states are float32 whatever
    the dtype of the weights, as those of the U-Net are while it is trained.
    """
    encoded = encode_tokens(
        text_encoder,
        batch["input_ids"],
        batch["caption_mask"],
        pad_to_max=pad_to_max,
        masks_padding=masks_padding,
    )
    pooled = None if encoded.pooled is None else encoded.pooled.float()
    return TextConditioning(encoded.hidden_states.float(), encoded.attention_mask, pooled)


def stored_conditioning(batch: Mapping[str, torch.Tensor]) -> TextConditioning:
    """The result of `encode_captions`, from a batch that holds precomputed embeddings."""
    return TextConditioning(batch["caption_states"], batch.get("caption_mask"), batch.get("caption_pooled"))


def drop_captions(
    batch: Mapping[str, torch.Tensor], empty: Mapping[str, torch.Tensor], dropped: torch.Tensor
) -> dict[str, torch.Tensor]:
    """
    Replaces some captions of a batch by the empty one, so that the model can be guided.

    Args:
        batch (mapping of `torch.Tensor` of shape `(batch_size, ...)`): Tokens or embeddings of captions.
        empty (mapping of `torch.Tensor`): The same of the empty caption, without the batch dimension, on the device of
            the batch.
        dropped (`torch.BoolTensor` of shape `(batch_size,)`): Which ones to replace.
    """
    return {
        name: torch.where(dropped.view(-1, *[1] * value.ndim), value.to(batch[name].dtype), batch[name])
        for name, value in empty.items()
    }


def text_model_kwargs(conditioning: TextConditioning, unet_config: Mapping[str, Any]) -> dict[str, Any]:
    """
    Keyword arguments of the U-Net's `forward`.

    Raises:
        ValueError: If the U-Net adds a pooled text to its time embedding, and the encoder gave none.
    """
    kwargs: dict[str, Any] = {
        "encoder_hidden_states": conditioning.hidden_states,
        "encoder_attention_mask": conditioning.attention_mask,
    }
    if unet_config.get("addition_embed_type") == "text_embeds":
        if conditioning.pooled is None:
            raise ValueError(
                '`unet` adds a pooled text to its time embedding (`addition_embed_type="text_embeds"`), but only '
                "states of the text are given. Pass `pooled_prompt_embeds` with `prompt_embeds`, as `encode_prompt` "
                "returns them; for a prompt, use an encoder with `text_embeds` or `pooler_output`, such as "
                "`CLIPTextModelWithProjection`."
            )
        kwargs["added_cond_kwargs"] = {"text_embeds": conditioning.pooled}
    return kwargs


def check_text_encoder(
    text_encoder: torch.nn.Module,
    tokenizer: Any | None,
    unet_config: Mapping[str, Any],
    is_projected: bool = False,
) -> None:
    """
    Raises a `ValueError` if the text encoder is incompatible with the U-Net, or the tokenizer with the text encoder.
    `is_projected`: whether states of any width are projected before they reach the U-Net.
    """
    if tokenizer is None:
        raise ValueError(
            "`text_encoder` was given without a `tokenizer`. Pass the tokenizer that it was trained with, to "
            "`from_pretrained` as `tokenizer=` (for converted GLIDE models: "
            "`diffusers_adm.conversion.load_glide_tokenizer`)."
        )
    name = type(text_encoder).__name__
    width, wanted = getattr(text_encoder.config, "hidden_size", None), cross_attention_width(unet_config)
    if wanted is None:
        raise ValueError(
            f"`text_encoder` is a {name}, but `unet` has no cross-attention. Pass "
            "`text_encoder=None` and `tokenizer=None`, or a U-Net with a cross-attention block type."
        )
    if width is not None and width != wanted and not is_projected:
        raise ValueError(
            f"`text_encoder` ({name}) gives states of width {width}, but `unet` takes {wanted} (`encoder_hid_dim` or "
            "`cross_attention_dim` in its config). Build the U-Net with `encoder_hid_dim="
            f'{width}, encoder_hid_dim_type="text_proj"`, which projects them, or use another encoder.'
        )
    check_tokenizer(text_encoder, tokenizer)


def check_tokenizer(text_encoder: torch.nn.Module, tokenizer: Any) -> None:
    """Raises a `ValueError` for a tokenizer without words, or with more tokens than the text encoder has."""
    name = type(text_encoder).__name__
    size = len(tokenizer) if hasattr(tokenizer, "__len__") else None
    if size is not None and size <= len(getattr(tokenizer, "all_special_tokens", ())):
        # Which transformers makes up for a folder that has an encoder's config, but no tokenizer.
        raise ValueError(
            f"`tokenizer` ({type(tokenizer).__name__}) has {size} tokens, all of them special, so it cannot tell "
            "texts apart. Were its files missing? Pass the tokenizer that the encoder was trained with."
        )
    rows = getattr(text_encoder.config, "vocab_size", None)
    if size is not None and rows is not None and size > rows:
        raise ValueError(
            f"`tokenizer` has {size} tokens, but the embedding of `text_encoder` ({name}) has {rows} rows. Pass the "
            "tokenizer that it was trained with, or build the encoder with a `vocab_size` of at least "
            f"{size}."
        )


def cross_attention_width(unet_config: Mapping[str, Any]) -> int | None:
    """Width of a U-Net's encoder states; `None` without cross-attention."""
    kinds = [
        *unet_config.get("down_block_types", ()),
        *unet_config.get("up_block_types", ()),
        unet_config.get("mid_block_type"),
    ]
    # A config of that class may leave out its blocks, which then have cross-attention.
    by_default = unet_config.get("_class_name") == "UNet2DConditionModel" and "down_block_types" not in unet_config
    if not by_default and not any("CrossAttn" in kind for kind in kinds if kind):
        return None
    width = unet_config.get("encoder_hid_dim") or unet_config.get("cross_attention_dim", DEFAULT_CROSS_ATTENTION_DIM)
    return width[0] if isinstance(width, (list, tuple)) else width


def map_text(text: TextConditioning, function: Callable[[torch.Tensor], torch.Tensor]) -> TextConditioning:
    """Applies `function` to each tensor that is not `None`."""
    return TextConditioning(*(None if tensor is None else function(tensor) for tensor in text))


def as_prompts(prompt: Prompts, number: int) -> list[str]:
    """The prompts of so many different images: one for all, or one for each; `None` are empty ones."""
    return [prompt or ""] * number if prompt is None or isinstance(prompt, str) else list(prompt)


def check_whole(text: TextConditioning, prefix: str) -> None:
    """Raises a `ValueError` for a mask or pooled text without the states that it belongs to."""
    if text.hidden_states is None and any(tensor is not None for tensor in text):
        raise ValueError(
            f"`{prefix}prompt_attention_mask` and `{prefix}pooled_prompt_embeds` belong to `{prefix}prompt_embeds`, "
            "which is missing. Pass it, or leave them out."
        )


def check_shapes(text: TextConditioning, prefix: str, width: int | None) -> None:
    """
    Raises a `ValueError` unless states, mask and pooled text are of as many prompts, and states of the width of the
    network, `None` if it is not known. Masks hold 0 and 1.
    """
    if text.hidden_states is None:
        return
    name, states = f"{prefix}prompt_embeds", text.hidden_states
    is_other = states.ndim != 3 or states.shape[2] != (width or states.shape[2])
    if is_other or not states.is_floating_point():
        raise ValueError(
            f"`{name}` has shape {tuple(text.hidden_states.shape)} and type {text.hidden_states.dtype}; this model "
            f"takes floating point numbers of shape (number of prompts, length, {width or 'width'})."
        )
    number, length = states.shape[:2]
    mask, pooled = text.attention_mask, text.pooled
    if mask is not None and (mask.shape != (number, length) or not bool(((mask == 0) | (mask == 1)).all())):
        raise ValueError(
            f"`{prefix}prompt_attention_mask` has shape {tuple(mask.shape)} and values from {mask.min():g} to "
            f"{mask.max():g}; it must have that of `{name}` without its width, {(number, length)}, 1 for states to "
            "attend to, and 0 for padding."
        )
    if pooled is not None and (len(pooled) != number or not pooled.is_floating_point()):
        raise ValueError(
            f"`{prefix}pooled_prompt_embeds` has shape {tuple(pooled.shape)} and type {pooled.dtype}; pass floating "
            f"point numbers, one row for each of the {number} prompts of `{name}`."
        )


def rows_of_text(text: TextConditioning, call: SamplingCall) -> TextConditioning:
    """One row per image of a call, in the dtype of its U-Net."""
    return map_text(text, lambda x: call.rows(x.to(call.unet_dtype) if x.is_floating_point() else x))


def prompts_for_guidance(prompt: Prompts, given: TextConditioning | None, call: SamplingCall) -> dict[str, Any]:
    """
    What functions that guide get of a prompt, one entry an image: `prompt` as a list of texts, or `prompt_embeds`, the
    encoded ones that were `given` in its place.
    """
    if given is not None:
        return {"prompt_embeds": rows_of_text(given, call).hidden_states}
    if prompt is None:
        return {}
    prompts = as_prompts(prompt, call.num_prompts)
    return {"prompt": [each for each in prompts for _ in range(len(call.noise) // call.num_prompts)]}


def pad_texts(*texts: TextConditioning) -> list[TextConditioning]:
    """Texts padded to the longest; a mask hides the padding, and if one of them has a mask, all have."""
    length = max(text.hidden_states.shape[1] for text in texts)
    if all(text.attention_mask is None and text.hidden_states.shape[1] == length for text in texts):
        return list(texts)
    padded = []
    for text in texts:
        missing = length - text.hidden_states.shape[1]
        mask = text.attention_mask
        if mask is None:
            mask = torch.ones(text.hidden_states.shape[:2], dtype=torch.long, device=text.hidden_states.device)
        states = F.pad(text.hidden_states, (0, 0, 0, missing))
        padded.append(TextConditioning(states, F.pad(mask, (0, missing)), text.pooled))
    return padded


def join_texts(*texts: TextConditioning) -> TextConditioning:
    """Concatenates texts to one batch; see `pad_texts`."""
    states, masks, pooled = zip(*pad_texts(*texts), strict=True)
    return TextConditioning(
        torch.cat(states),
        None if masks[0] is None else torch.cat(masks),
        None if any(each is None for each in pooled) else torch.cat(pooled),
    )


class TextCondition(Condition):
    """
    Captions or prompts for a U-Net with cross-attention.

    Args:
        unet_config (mapping): The config of the U-Net.
        text_encoder (`torch.nn.Module`, *optional*): Not needed for precomputed embeddings. Trained if its weights
            require gradients; may be wrapped for distributed training.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): For prompts.
        empty_caption (mapping of `torch.Tensor`, *optional*): For training: what examples hold for the empty caption.
        dropout_prob (`float`, defaults to 0.0): Share of the captions that training replaces by the empty one.
        masks_padding (`bool`, defaults to `False`): Hides the padding also of encoders that were trained with it; see
            `encode_tokens`.
        takes_pooled (`bool`, *optional*): Whether the network takes a pooled text. `None`: if the U-Net adds it to its
            time embedding.
        states_width (`int`, *optional*): Width of encoded prompts. `None`: the width that the U-Net attends to.
    """

    argument = "prompt"

    def __init__(
        self,
        unet_config: Mapping[str, Any],
        text_encoder: torch.nn.Module | None = None,
        tokenizer: Any | None = None,
        *,
        empty_caption: Mapping[str, torch.Tensor] | None = None,
        dropout_prob: float = 0.0,
        masks_padding: bool = False,
        takes_pooled: bool | None = None,
        states_width: int | None = None,
    ):
        super().__init__()
        self.unet_config, self.text_encoder, self.tokenizer = unet_config, text_encoder, tokenizer
        self.empty_caption, self.dropout_prob, self.masks_padding = empty_caption, dropout_prob, masks_padding
        added = unet_config.get("addition_embed_type") == "text_embeds"
        self.takes_pooled = added if takes_pooled is None else takes_pooled
        self.width = cross_attention_width(unet_config)
        self.states_width = self.width if states_width is None else states_width
        self.is_droppable = self.width is not None
        self.prompt: Prompts = None
        self.negative_prompt: Prompts = None
        self.given: TextConditioning | None = None
        self.negative_given: TextConditioning | None = None

    @property
    def pad_to_max(self) -> bool:
        """See `pads_to_max`."""
        return pads_to_max(getattr(self.text_encoder, "module", self.text_encoder), self.unet_config)

    def for_training(self, batch: Mapping[str, torch.Tensor]) -> UNetInputs:
        """Reads `input_ids` and `caption_mask` `(batch_size, length)`, or precomputed `caption_states` and the like."""
        return UNetInputs(text_model_kwargs(self.training_text(batch), self.unet_config))

    def training_text(self, batch: Mapping[str, torch.Tensor]) -> TextConditioning:
        """The encoded captions of a batch, some of them dropped; see `for_training`."""
        some = batch[next(iter(self.empty_caption))]
        if some.device != next(iter(self.empty_caption.values())).device:  # once, not in each step
            self.empty_caption = {name: value.to(some.device) for name, value in self.empty_caption.items()}
        dropped = torch.rand(some.shape[0], device=some.device) < self.dropout_prob
        captions = drop_captions(batch, self.empty_caption, dropped)
        if "caption_states" in captions:
            return stored_conditioning(captions)
        # Without autocast, as for precomputed embeddings; `prepare` gave it to a trained encoder.
        return encode_captions(
            self.text_encoder, captions, pad_to_max=self.pad_to_max, masks_padding=self.masks_padding
        )

    def read(
        self,
        prompt: Prompts,
        given: TextConditioning,
        negative_prompt: Prompts,
        negative_given: TextConditioning,
    ) -> TextCondition:
        r"""
        Takes the arguments of a call; raises a `ValueError` for those that the U-Net could not use.

        Args:
            prompt, negative_prompt (`str` or list of `str`, *optional*): One for all images, or one for each.
            given, negative_given (`TextConditioning`): Encoded prompts in their place; of `None` otherwise.
        """
        self._check_one(prompt, given, "")
        self._check_one(negative_prompt, negative_given, "negative_")
        self.prompt, self.negative_prompt = prompt, negative_prompt
        self.given = given if given.hidden_states is not None else None
        self.negative_given = negative_given if negative_given.hidden_states is not None else None
        if self.given is not None:
            self.counts["prompt_embeds"] = len(self.given.hidden_states)
        elif isinstance(prompt, (list, tuple)):
            self.counts["prompt"] = len(prompt)
        self.is_given = self.has_negative or prompt is not None or self.given is not None
        return self

    @property
    def has_negative(self) -> bool:
        """Whether the call has a negative prompt."""
        return self.negative_prompt is not None or self.negative_given is not None

    def _check_one(self, prompt: Prompts, given: TextConditioning, prefix: str) -> None:
        name, embeds_name = f"`{prefix}prompt`", f"`{prefix}prompt_embeds`"
        if prompt is None and all(tensor is None for tensor in given):
            return
        if not self.is_droppable:
            raise ValueError(
                f"{name if prompt is not None else embeds_name} was given, but this model is not conditioned on text: "
                "its U-Net has no cross-attention. Leave it out."
            )
        if prompt is not None and given.hidden_states is not None:
            raise ValueError(f"Both {name} and {embeds_name} were given. Pass one of them.")
        check_whole(given, prefix)
        if given.pooled is not None and not self.takes_pooled:
            raise ValueError(
                f"`{prefix}pooled_prompt_embeds` was given, but this U-Net takes none (its `addition_embed_type` "
                "is not 'text_embeds'). Leave it out."
            )
        check_shapes(given, prefix, self.states_width)

    def prepare(self, call: SamplingCall) -> PreparedCondition:
        """
        The encoded prompts, and the negative ones in the unconditional pass, which is unknown if these were not given
        and the text encoder would have to run for them alone without need.
        """
        if not self.is_droppable:
            return PreparedCondition.same_in_both(UNetInputs())
        text, negative = self.texts(call)
        if negative is None:
            return PreparedCondition(UNetInputs(text_model_kwargs(text, self.unet_config)), None)
        conditional, unconditional = (
            UNetInputs(text_model_kwargs(each, self.unet_config)) for each in pad_texts(text, negative)
        )
        return PreparedCondition(conditional, unconditional)

    def texts(self, call: SamplingCall) -> tuple[TextConditioning, TextConditioning | None]:
        """The encoded prompts and the negative ones, one row per image; the latter may be `None`, see `prepare`."""
        text, negative = self.given, self.negative_given
        wants_negative = call.guidance_scale != 1.0 or self.negative_prompt is not None
        if text is None or (negative is None and wants_negative):
            prompt = self.prompt
            encoded, negative_encoded = self.encode(
                as_prompts(prompt, call.num_prompts), self.negative_prompt, call.noise.device
            )
            text, negative = text or encoded, negative or negative_encoded
        if negative is None:
            return rows_of_text(text, call), None
        if len(negative.hidden_states) not in (1, call.num_prompts):
            raise ValueError(
                f"`negative_prompt_embeds` holds {len(negative.hidden_states)} prompts, but the call has "
                f"{call.num_prompts}. Pass one for all, or one for each."
            )
        lengths = [states.shape[1] for states in (text.hidden_states, negative.hidden_states)]
        if self.unet_config.get("addition_embed_type") == "text" and lengths[0] != lengths[1]:
            raise ValueError(
                f"`prompt_embeds` and `negative_prompt_embeds` have {lengths[0]} and {lengths[1]} states. This U-Net "
                "pools them, padding included, so they must be equally many. Encode both with `encode_prompt`."
            )
        return rows_of_text(text, call), rows_of_text(negative, call)

    def for_guidance(self, call: SamplingCall) -> dict[str, Any]:
        """`prompt` as a list of texts, or `prompt_embeds`, the encoded ones that were given in its place."""
        return prompts_for_guidance(self.prompt, self.given, call)

    def without_effect(self, num_steps: int, may_guide: bool, uses_classifier: bool) -> list[str]:
        """Warns of a negative prompt without guidance."""
        if not self.has_negative or may_guide:
            return []
        return [
            "`negative_prompt` has no effect: `guidance_scale` is 1.0, which is off. Pass another `guidance_scale`, or "
            "leave it out."
        ]

    def encode(
        self, prompt: str | Sequence[str], negative_prompt: Prompts, device: torch.device
    ) -> tuple[TextConditioning, TextConditioning]:
        """
        Encodes prompts and as many negative ones (`None`: empty ones) in one run of the text encoder.

        Raises:
            ValueError: Without a text encoder, or for another number of negative prompts than of prompts.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negative_prompt = "" if negative_prompt is None else negative_prompt
        negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("This pipeline has no text encoder and tokenizer. Load it with both.")
        if len(negatives) != len(prompts):
            raise ValueError(
                f"`negative_prompt` holds {len(negatives)} prompts, but there are {len(prompts)} of `prompt`. Pass one "
                "for each, or a single string for all."
            )
        unique = list(dict.fromkeys([*prompts, *negatives]))
        max_length = max_prompt_length(self.tokenizer, self.text_encoder)
        input_ids, attention_mask = tokenize(self.tokenizer, unique, max_length=max_length, pad_to_max=self.pad_to_max)
        encoded = encode_tokens(
            self.text_encoder,
            input_ids.to(device),
            attention_mask.to(device),
            pad_to_max=self.pad_to_max,
            masks_padding=self.masks_padding,
        )
        rows, negative_rows = ([unique.index(text) for text in texts] for texts in (prompts, negatives))
        return map_text(encoded, lambda x: x[rows]), map_text(encoded, lambda x: x[negative_rows])
