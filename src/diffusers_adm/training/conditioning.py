"""Loading of text encoders and captions for the training scripts; see `diffusers_adm.conditioning` for conditions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..conditioning.text import TextCondition, check_text_encoder, cross_attention_width, pads_to_max
from ..data.captions import CaptionEmbeddings, CaptionTokens
from ..data.text_encoders import build_text_encoder, freeze_unused_parameters, load_text_encoder, load_tokenizer
from .arguments import DataArguments, ModelArguments, TextArguments


if TYPE_CHECKING:
    # `datasets` comes with the `train` extra; the losses of this package must be importable without it.
    import datasets


def load_text(
    model_args: ModelArguments,
    data_args: DataArguments,
    text_args: TextArguments,
    unet_config: Mapping[str, Any],
    seed: int,
) -> tuple[torch.nn.Module | None, Any | None]:
    """
    Loads text encoder and tokenizer; two `None` without captions.

    Raises:
        ValueError: If one of them cannot be read, or is incompatible with the other or the U-Net.
    """
    width, column = cross_attention_width(unet_config), text_args.caption_column
    if column is None:
        if width is not None:
            raise ValueError(
                "The U-Net has cross-attention, so it needs captions, but there is no `caption_column`. Pass it, or "
                "use a U-Net without `CrossAttn` in its block types."
            )
        return None, None
    if width is None:
        raise ValueError(
            f"`caption_column` is {column!r}, but the U-Net has no cross-attention. Use "
            "block types such as `SimpleCrossAttnDownBlock2D` or `CrossAttnDownBlock2D`, or leave `caption_column` out."
        )
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
    if text_args.tokenizer_name_or_path is not None:
        name = text_args.tokenizer_name_or_path
        tokenizer = load_tokenizer("tokenizer_name_or_path", name, cache_dir=data_args.cache_dir)
    else:
        tokenizer = load_tokenizer(argument, source, **hub)
    if source is None:
        text_encoder = build_text_encoder(text_args.text_encoder_config_name_or_path, tokenizer, seed)
    else:
        if argument == "pretrained_model_name_or_path":
            hub["variant"] = model_args.variant
        text_encoder = load_text_encoder(argument, source, trained=text_args.train_text_encoder, **hub)
    check_text_encoder(text_encoder, tokenizer, unet_config)
    return text_encoder, tokenizer


def prepare_captions(
    images: datasets.Dataset,
    tokenizer: Any,
    text_encoder: torch.nn.Module,
    text_args: TextArguments,
    unet_config: Mapping[str, Any],
    device: torch.device | str,
    cache_dir: str | None = None,
) -> CaptionTokens | CaptionEmbeddings:
    """
    Tokenizes the captions of the data, and encodes them if `precompute_text_embeddings` is set; moves the text encoder
    to `device` (to the CPU if it is no longer needed there) and freezes it unless it is trained.

    Args:
        images (`datasets.Dataset`): With the column `caption`.
        cache_dir (`str`, *optional*): For the embeddings; see `CaptionEmbeddings`.
    """
    tokens = CaptionTokens(images["caption"][:], tokenizer, text_encoder, pads_to_max(text_encoder, unet_config))
    text_encoder.to(device)
    if text_args.train_text_encoder:
        freeze_unused_parameters(text_encoder, tokens, unet_config)
    else:
        text_encoder.requires_grad_(False).eval()
    if not text_args.precompute_text_embeddings:
        return tokens
    embeddings = CaptionEmbeddings(tokens, text_encoder, cache_dir)
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
    """
    Keyword arguments of the U-Net for the captions of a batch; see `TextCondition.for_training`.

    Args:
        batch (mapping of `torch.Tensor` of shape `(batch_size, ...)`): From examples with these `captions`.
        empty_caption (mapping of `torch.Tensor`): `captions.empty`, on the device of the batch.
        text_encoder (`torch.nn.Module`): As prepared for training; gradients flow if it is trained.
    """
    text = TextCondition(
        unet_config, text_encoder, empty_caption=empty_caption, dropout_prob=text_args.caption_dropout_prob
    )
    return text.for_training(batch).kwargs
