"""
The captions of a dataset, as tokens (`CaptionTokens`) or encoded (`CaptionEmbeddings`).

Either is passed to `ImageDataset`, whose examples then hold the tensors that `TextCondition` reads. An example may have
several captions, of which each epoch draws one.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from ..conditioning.text import cut_off, encode_captions, max_prompt_length, tokenize
from .fingerprints import hash_config, hash_plain, hash_tensors
from .seeding import derive_seed


logger = logging.getLogger(__name__)

EMPTY_CAPTION = 0  # the number of "" among the distinct captions
ENCODING_BATCH_SIZE = 64  # captions
# Bump when `CaptionEmbeddings` stores something else: caches of older versions are then not used.
EMBEDDINGS_VERSION = 1


class Captions:
    """
    The captions of a dataset, each distinct one held once.

    Args:
        captions (sequence of `str` or of sequences of `str`): The caption of each example, or all its captions, in the
            order of the dataset; "" or an empty sequence for a missing one.
    """

    def __init__(self, captions: Sequence[str] | Sequence[Sequence[str]]):
        lists = [[caption] if isinstance(caption, str) else caption or [""] for caption in captions]
        self.texts = list(dict.fromkeys(["", *itertools.chain(*lists)]))  # "" is number `EMPTY_CAPTION`
        numbers = {text: number for number, text in enumerate(self.texts)}
        # The captions of all examples in a row: those of example i are the numbers from `starts[i]` to `starts[i + 1]`.
        self.numbers = torch.tensor([numbers[text] for texts in lists for text in texts])
        self.starts = torch.tensor([0, *itertools.accumulate(map(len, lists))])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Returns the tensors of an example's caption, the first one if it has several."""
        return self.distinct(int(self.numbers[self.starts[index]]))

    def at(self, index: int, seed: int, epoch: int) -> dict[str, torch.Tensor]:
        """
        Returns the tensors of the caption that an example has in an epoch: of several, each is equally likely; a text
        that is listed twice is drawn twice as often. The draw depends only on the seed of the run, the epoch and the
        index.
        """
        start, end = self.starts[index : index + 2].tolist()
        drawn = derive_seed(seed, "caption", epoch, index) % (end - start) if end - start > 1 else 0
        return self.distinct(int(self.numbers[start + drawn]))

    def distinct(self, number: int) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    @property
    def empty(self) -> dict[str, torch.Tensor]:
        """The tensors of the caption "", which stands for "no caption"."""
        return self.distinct(EMPTY_CAPTION)


class CaptionTokens(Captions):
    """
    Captions as token ids, padded to one length. An example gets `input_ids` and `caption_mask`, int64 of shape
    `(length,)`.

    Args:
        captions (sequence of `str` or of sequences of `str`): One or several per example.
        tokenizer, text_encoder: They limit the length; the number of captions that are cut is logged.
        pad_to_max (`bool`): See `diffusers_adm.conditioning.text.pads_to_max`.
    """

    def __init__(
        self,
        captions: Sequence[str] | Sequence[Sequence[str]],
        tokenizer: Any,
        text_encoder: torch.nn.Module,
        pad_to_max: bool,
    ):
        super().__init__(captions)
        self.pad_to_max = pad_to_max
        max_length = max_prompt_length(tokenizer, text_encoder)
        lost = cut_off(tokenizer, self.texts, max_length)
        if lost:
            text, rest = next(iter(lost.items()))
            logger.warning(
                f"{len(lost)} of {len(self.texts)} distinct captions have more than {max_length} tokens and are cut. "
                f"The first: {text!r}, which loses {rest!r}"
            )
        ids, mask = tokenize(tokenizer, self.texts, max_length=max_length, pad_to_max=pad_to_max, warn=False)
        self.input_ids, self.attention_mask = ids.int(), mask.bool()  # (distinct captions, length)

    def distinct(self, number: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.input_ids[number].long(), "caption_mask": self.attention_mask[number].long()}


class CaptionEmbeddings(Captions):
    """
    Encoded captions, on disk. An example gets `caption_states` of shape `(length, width)`, for pooling encoders
    `caption_pooled` of shape `(width,)`, both float32, and `caption_mask` if padding is masked.

    Each distinct caption is encoded once. `datasets` keeps the result with its other caches, under a name derived from
    the weights of the encoder and the tokens, for later runs and for the other processes of this one.

    Args:
        tokens (`CaptionTokens`): The captions.
        text_encoder (`torch.nn.Module`): In evaluation mode, on the device to encode on.
        cache_dir (`str`, *optional*): Defaults to the cache folder of `datasets`.
    """

    def __init__(self, tokens: CaptionTokens, text_encoder: torch.nn.Module, cache_dir: str | None = None):
        import datasets

        self.texts, self.numbers, self.starts = tokens.texts, tokens.numbers, tokens.starts
        self.pad_to_max = tokens.pad_to_max
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
            # Masked states are never read, so they are not stored.
            masks = [slice(None)] * len(numbers) if encoded.attention_mask is None else encoded.attention_mask.bool()
            rows = {"states": [states[m].cpu().numpy() for states, m in zip(encoded.hidden_states, masks, strict=True)]}
            return rows if encoded.pooled is None else {**rows, "pooled": encoded.pooled.cpu().numpy()}

        inputs = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}
        parts = (hash_config(text_encoder), hash_tensors(text_encoder.state_dict()), hash_tensors(inputs))
        versions = (EMBEDDINGS_VERSION, torch.__version__, transformers.__version__)
        fingerprint = hash_plain([*versions, tokens.pad_to_max, *parts])
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
