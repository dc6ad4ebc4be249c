"""
From captions to what a U-Net with cross-attention takes: the one place where training and sampling agree on padding.

Two kinds of text encoder are told apart. CLIP's (https://huggingface.co/papers/2103.00020, as Stable Diffusion uses it)
and GLIDE's (https://huggingface.co/papers/2112.10741) were trained, or the U-Nets on top of them were, with every
caption padded to one fixed length, whose padding is read like words: they get just that, and the U-Net no mask. All
others (T5, BERT, ...) are padded to the longest caption of a batch, and encoder and U-Net get a mask that hides it.
Either way the padding of one caption does not depend on the others.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .condition import Condition, UNetInputs


logger = logging.getLogger(__name__)

# A tokenizer keeps truncation and padding as a state of its own, which each call sets: two threads would fail in it, or
# mix theirs up.
_TOKENIZER_LOCK = threading.Lock()
# Where neither tokenizer nor encoder names a limit. T5, which needs none, was trained with this many tokens.
DEFAULT_MAX_LENGTH = 512
# From here on a tokenizer's limit is none: transformers writes "no limit" as a number like 1e30.
NO_MAX_LENGTH = 1_000_000
# Of the U-Net, for configs that leave it out.
DEFAULT_CROSS_ATTENTION_DIM = 1280
DEFAULT_BLOCK_OUT_CHANNELS = (320, 640, 1280, 1280)


class TextConditioning(NamedTuple):
    """
    Encoded captions.

    Attributes:
        hidden_states (`torch.Tensor` of shape `(batch_size, length, width)`): One state a token.
        attention_mask (`torch.Tensor` of shape `(batch_size, length)`, *optional*): 1 for the tokens that
            cross-attention sees, 0 for padding; `None`: it sees all.
        pooled (`torch.Tensor` of shape `(batch_size, pooled_width)`, *optional*): One vector a caption, where the
            encoder gives one.
    """

    hidden_states: torch.Tensor
    attention_mask: torch.Tensor | None
    pooled: torch.Tensor | None


def _is_clip(text_encoder: torch.nn.Module) -> bool:
    return str(getattr(text_encoder.config, "model_type", "")).startswith("clip")


def pads_to_max(text_encoder: torch.nn.Module, unet_config: Mapping[str, Any]) -> bool:
    """
    Whether captions are padded to `max_prompt_length` and seen with their padding, instead of masked: for CLIP, for
    encoders with the attribute `attends_to_padding`, and where the U-Net pools or normalises over all states, which a
    mask would not reach (`addition_embed_type="text"`, `cross_attention_norm="group_norm"`; DeepFloyd IF has both).
    """
    reads_padding = _is_clip(text_encoder) or getattr(text_encoder, "attends_to_padding", False)
    mixes_states = unet_config.get("cross_attention_norm") == "group_norm"
    return reads_padding or mixes_states or unet_config.get("addition_embed_type") == "text"


def max_prompt_length(tokenizer: Any, text_encoder: torch.nn.Module) -> int:
    """
    Number of tokens, special ones included, that both can take. For encoders with the attribute `attends_to_padding`
    it is theirs alone, because they read captions of that one length.
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
    Token numbers of captions.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Of transformers, with a padding token.
        prompts (sequence of `str`): Captions; empty ones are allowed.
        max_length (`int`): Number of tokens, special ones included, after which a caption is cut.
        pad_to_max (`bool`): Pad to `max_length`; else to the longest of these captions.
        warn (`bool`, defaults to `True`): Log what each over-long caption loses.

    Returns:
        `tuple` of two `torch.LongTensor` of shape `(len(prompts), length)`: Token numbers, and a mask that is 1 for
        tokens and 0 for padding; only 0 where a caption has no tokens at all, as the empty one of a tokenizer without
        special tokens. At least one token long.

    Raises:
        ValueError: If the tokenizer has no padding token.
    """
    if getattr(tokenizer, "pad_token_id", 0) is None:
        raise ValueError(
            f"`tokenizer` ({type(tokenizer).__name__}) has no padding token, so captions of different lengths cannot "
            "share a batch. Give it one, e.g. `tokenizer.pad_token = tokenizer.eos_token`, and save it."
        )
    for prompt, lost in cut_off(tokenizer, prompts, max_length).items() if warn else ():
        logger.warning(
            f"The prompt {prompt!r} has more than {max_length} tokens; this part of it is not read: {lost!r}"
        )
    with _TOKENIZER_LOCK:
        encoded = tokenizer(
            list(prompts),
            padding="max_length" if pad_to_max else "longest",
            # Whatever the tokenizer says: on the left, padding would move the words to other positions.
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
    """What `max_length` tokens do not hold of each caption that is longer."""
    room = max_length - tokenizer.num_special_tokens_to_add()
    # Once more without special tokens: they would come back in the decoded rest. `verbose` would warn without a text.
    with _TOKENIZER_LOCK:
        lengths = tokenizer(list(prompts), add_special_tokens=False, verbose=False)["input_ids"]
    return {
        prompt: tokenizer.decode(ids[room:]) for prompt, ids in zip(prompts, lengths, strict=True) if len(ids) > room
    }


def encode_tokens(
    text_encoder: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, *, pad_to_max: bool
) -> TextConditioning:
    r"""
    Runs the text encoder. Gradients flow.

    Args:
        text_encoder (`torch.nn.Module`): An encoder of transformers, or one that returns `(hidden_states, pooled)`;
            also wrapped for distributed training.
        input_ids, attention_mask (`torch.LongTensor` of shape `(batch_size, length)`): From [`tokenize`].
        pad_to_max (`bool`): As given to [`tokenize`]; then cross-attention sees padding as well.
    """
    unwrapped = getattr(text_encoder, "module", text_encoder)
    if not getattr(unwrapped, "attends_to_padding", False):
        # Attention to nothing is undefined, so of an empty caption the first padding is seen.
        is_empty = attention_mask.sum(dim=1, keepdim=True) == 0
        attention_mask = torch.cat([attention_mask[:, :1] | is_empty, attention_mask[:, 1:]], dim=1)
    # CLIP's text encoder is causal and was trained without a mask; Stable Diffusion gives it one only if told so.
    passes_mask = not _is_clip(unwrapped) or getattr(unwrapped.config, "use_attention_mask", False)
    output = text_encoder(input_ids, attention_mask=attention_mask if passes_mask else None)
    if isinstance(output, tuple):
        hidden_states, pooled = output
    else:
        hidden_states = output.last_hidden_state
        pooled = output.get("text_embeds", output.get("pooler_output"))
    return TextConditioning(hidden_states, None if pad_to_max else attention_mask, pooled)


def encode_captions(
    text_encoder: torch.nn.Module, batch: Mapping[str, torch.Tensor], *, pad_to_max: bool
) -> TextConditioning:
    """
    Encodes the `input_ids` and `caption_mask` of a batch for training; gradients flow. The states are float32 whatever
    the dtype of the weights, as those of the U-Net are while it is trained.
    """
    encoded = encode_tokens(text_encoder, batch["input_ids"], batch["caption_mask"], pad_to_max=pad_to_max)
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
                '`unet` adds a pooled text to its time embedding (`addition_embed_type="text_embeds"`), but this text '
                "encoder gives states alone. Take an encoder with `text_embeds` or `pooler_output`, such as "
                "`CLIPTextModelWithProjection`."
            )
        kwargs["added_cond_kwargs"] = {"text_embeds": conditioning.pooled}
    return kwargs


def check_text_encoder(text_encoder: torch.nn.Module, tokenizer: Any | None, unet_config: Mapping[str, Any]) -> None:
    r"""
    Raises:
        ValueError: If the states of the text encoder do not fit the U-Net's cross-attention, or its projection the time
            embedding, or the tokenizer is missing, empty, or has more tokens than the encoder knows.
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
            f"`text_encoder` is a {name}, but `unet` has no cross-attention that could read its states. Pass "
            "`text_encoder=None` and `tokenizer=None`, or a U-Net with a cross-attention block type."
        )
    if width is not None and width != wanted:
        raise ValueError(
            f"`text_encoder` ({name}) gives states of width {width}, but `unet` takes {wanted} (`encoder_hid_dim` or "
            "`cross_attention_dim` in its config). Build the U-Net with `encoder_hid_dim="
            f'{width}, encoder_hid_dim_type="text_proj"`, which projects them, or take another encoder.'
        )
    if unet_config.get("addition_embed_type") == "text_embeds" and hasattr(text_encoder, "text_projection"):
        pooled_width = getattr(text_encoder.config, "projection_dim", None)
        time_embed_dim = (
            unet_config.get("time_embedding_dim")
            or 4 * unet_config.get("block_out_channels", DEFAULT_BLOCK_OUT_CHANNELS)[0]
        )
        if pooled_width != time_embed_dim:
            raise ValueError(
                f"`text_encoder` ({name}) pools to a width of {pooled_width} (`projection_dim`), but `unet` adds what "
                f"is pooled to a time embedding of {time_embed_dim} (`time_embedding_dim`). They must be equal."
            )
    size = len(tokenizer) if hasattr(tokenizer, "__len__") else None
    if size is not None and size <= len(getattr(tokenizer, "all_special_tokens", ())):
        # What transformers makes up for a folder that has an encoder's config, but no tokenizer.
        raise ValueError(
            f"`tokenizer` ({type(tokenizer).__name__}) has {size} tokens, all of them special, so every text is the "
            "same to it. Were its files missing? Pass the tokenizer that the encoder was trained with."
        )
    rows = getattr(text_encoder.config, "vocab_size", None)
    if size is not None and rows is not None and size > rows:
        raise ValueError(
            f"`tokenizer` has {size} tokens, but the embedding of `text_encoder` ({name}) has {rows} rows. Pass the "
            "tokenizer that it was trained with, or build the encoder with a `vocab_size` of at least "
            f"{size}."
        )


def cross_attention_width(unet_config: Mapping[str, Any]) -> int | None:
    """Width of the encoder states that a U-Net takes; `None` for one without cross-attention."""
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
    """`function` of each tensor that there is."""
    return TextConditioning(*(None if tensor is None else function(tensor) for tensor in text))


def join_texts(*texts: TextConditioning) -> TextConditioning:
    """All in one batch, as long as the longest; a mask hides what is added to the others."""
    length = max(text.hidden_states.shape[1] for text in texts)
    is_masked = any(text.attention_mask is not None or text.hidden_states.shape[1] < length for text in texts)
    states, masks, pooled = [], [], [text.pooled for text in texts if text.pooled is not None]
    for text in texts:
        missing = length - text.hidden_states.shape[1]
        mask = text.attention_mask
        if mask is None:
            mask = torch.ones(text.hidden_states.shape[:2], dtype=torch.long, device=text.hidden_states.device)
        states.append(F.pad(text.hidden_states, (0, 0, 0, missing)))
        masks.append(F.pad(mask, (0, missing)))
    return TextConditioning(
        torch.cat(states), torch.cat(masks) if is_masked else None, torch.cat(pooled) if pooled else None
    )


class TextCondition(Condition):
    """
    Captions or prompts for a U-Net with cross-attention.

    Args:
        unet_config (mapping): The config of the U-Net.
        text_encoder (`torch.nn.Module`, *optional*): Not needed for precomputed embeddings. Trained if its weights
            require gradients; may be wrapped for distributed training.
        empty_caption (mapping of `torch.Tensor`, *optional*): For training: what examples hold for the empty caption.
        dropout_prob (`float`, defaults to 0.0): Share of the captions that training replaces by the empty one.
    """

    argument = "prompt"

    def __init__(
        self,
        unet_config: Mapping[str, Any],
        text_encoder: torch.nn.Module | None = None,
        *,
        empty_caption: Mapping[str, torch.Tensor] | None = None,
        dropout_prob: float = 0.0,
    ):
        super().__init__()
        self.unet_config, self.text_encoder = unet_config, text_encoder
        self.empty_caption, self.dropout_prob = empty_caption, dropout_prob

    @property
    def pad_to_max(self) -> bool:
        """See `pads_to_max`."""
        return pads_to_max(getattr(self.text_encoder, "module", self.text_encoder), self.unet_config)

    def for_training(self, batch: Mapping[str, torch.Tensor]) -> UNetInputs:
        """Reads `input_ids` and `caption_mask` `(batch_size, length)`, or precomputed `caption_states` and the like."""
        some = batch[next(iter(self.empty_caption))]
        if some.device != next(iter(self.empty_caption.values())).device:  # once, not in each step
            self.empty_caption = {name: value.to(some.device) for name, value in self.empty_caption.items()}
        dropped = torch.rand(some.shape[0], device=some.device) < self.dropout_prob
        captions = drop_captions(batch, self.empty_caption, dropped)
        if "caption_states" in captions:
            text = stored_conditioning(captions)
        else:  # without autocast, as for precomputed embeddings; `prepare` gave it to a trained encoder
            text = encode_captions(self.text_encoder, captions, pad_to_max=self.pad_to_max)
        return UNetInputs(text_model_kwargs(text, self.unet_config))
