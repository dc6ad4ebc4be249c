"""
The captions of a dataset, as tokens (`CaptionTokens`) or encoded (`CaptionEmbeddings`).

Either is passed to `ImageDataset`, whose examples then hold the tensors that `TextCondition` reads. An example may have
several captions, of which each epoch draws one.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers

from ..conditioning.text import cut_off, encode_captions, max_prompt_length, tokenize
from .fingerprints import hash_config, hash_plain, hash_tensors
from .seeding import derive_seed
from .stored_rows import Rows, RowsOfVectors


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
        return self.distinct(self.number_at(index, seed, epoch))

    def of_example(self, example: Mapping[str, Any], index: int, seed: int, epoch: int) -> dict[str, torch.Tensor]:
        """The same for an example of the dataset, which is at this index."""
        return self.at(index, seed, epoch)

    def number_at(self, index: int, seed: int, epoch: int) -> int:
        """The number, among the distinct captions, of the caption that `at` returns."""
        start, end = self.starts[index : index + 2].tolist()
        drawn = derive_seed(seed, "caption", epoch, index) % (end - start) if end - start > 1 else 0
        return int(self.numbers[start + drawn])

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


class StreamedCaptions(Captions):
    """
    Captions of streamed examples, tokenized one by one and padded to the longest that tokenizer and text encoder can
    take. Masks tell the padding, so the text means the same as with that of [`CaptionTokens`].

    Args:
        examples (sequence of `str` or of sequences of `str`): Captions of the first examples: those that are cut are
            logged.
        tokenizer, text_encoder, pad_to_max: As for [`CaptionTokens`].
    """

    def __init__(
        self,
        examples: Sequence[str] | Sequence[Sequence[str]],
        tokenizer: Any,
        text_encoder: torch.nn.Module,
        pad_to_max: bool,
    ):
        super().__init__([])
        self.tokenizer, self.pad_to_max = tokenizer, pad_to_max
        self.max_length = max_prompt_length(tokenizer, text_encoder)
        texts = Captions(examples).texts
        lost = cut_off(tokenizer, texts, self.max_length)
        if lost:
            text, rest = next(iter(lost.items()))
            logger.warning(
                f"{len(lost)} of {len(texts)} captions of the first examples have more than {self.max_length} tokens, "
                f"and are cut, as later ones will be. The first: {text!r}, which loses {rest!r}"
            )

    def of_example(self, example: Mapping[str, Any], index: int, seed: int, epoch: int) -> dict[str, torch.Tensor]:
        captions = example["caption"]
        if not isinstance(captions, str):
            drawn = derive_seed(seed, "caption", epoch, index) % len(captions) if captions else 0
            captions = captions[drawn] if captions else ""
        return self._tokens(captions)

    def distinct(self, number: int) -> dict[str, torch.Tensor]:
        return self._tokens(self.texts[number])

    def _tokens(self, text: str) -> dict[str, torch.Tensor]:
        ids, mask = tokenize(self.tokenizer, [text], max_length=self.max_length, pad_to_max=True, warn=False)
        return {"input_ids": ids[0], "caption_mask": mask[0]}


class NumberedCaptions(CaptionTokens):
    """
    Captions as token ids, with what tells which images of a batch a caption describes: it may be one of several images,
    and an image may have several captions.

    An example also gets `caption_number`, the number of its caption among the distinct ones, and `caption_numbers`,
    those of all its captions, -1 in the rest of `(most captions of an example,)`; both int64.
    """

    def at(self, index: int, seed: int, epoch: int) -> dict[str, torch.Tensor]:
        number = self.number_at(index, seed, epoch)
        own = self.numbers[self.starts[index] : self.starts[index + 1]].unique()
        numbers = torch.full((int(self.starts.diff().max()),), -1)
        numbers[: len(own)] = own
        return self.distinct(number) | {"caption_number": torch.tensor(number), "caption_numbers": numbers}


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
        masks_padding (`bool`, defaults to `False`): Mask the padding also of encoders that were trained with it; see
            `encode_tokens`.
    """

    def __init__(
        self,
        tokens: CaptionTokens,
        text_encoder: torch.nn.Module,
        cache_dir: str | None = None,
        masks_padding: bool = False,
    ):
        import datasets

        self.texts, self.numbers, self.starts = tokens.texts, tokens.numbers, tokens.starts
        self.pad_to_max, self.masks_padding = tokens.pad_to_max, masks_padding
        how = {"pad_to_max": self.pad_to_max, "masks_padding": masks_padding}
        self.length = tokens.input_ids.shape[1]
        device = next(text_encoder.parameters()).device
        with torch.no_grad():
            empty = {name: value[None].to(device) for name, value in tokens.empty.items()}
            example = encode_captions(text_encoder, empty, **how)
        features = {"states": datasets.Array2D((None, example.hidden_states.shape[-1]), "float32")}
        if example.pooled is not None:
            features["pooled"] = datasets.List(datasets.Value("float32"), length=example.pooled.shape[-1])

        def encode(numbers: list[int]) -> dict[str, Any]:
            batch = {name: torch.stack([tokens.distinct(i)[name] for i in numbers]).to(device) for name in empty}
            with torch.no_grad():
                encoded = encode_captions(text_encoder, batch, **how)
            # Masked states are never read, so they are not stored.
            masks = [slice(None)] * len(numbers) if encoded.attention_mask is None else encoded.attention_mask.bool()
            rows = {"states": [states[m].cpu().numpy() for states, m in zip(encoded.hidden_states, masks, strict=True)]}
            return rows if encoded.pooled is None else {**rows, "pooled": encoded.pooled.cpu().numpy()}

        inputs = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}
        parts = (hash_config(text_encoder), hash_tensors(text_encoder.state_dict()), hash_tensors(inputs))
        versions = (EMBEDDINGS_VERSION, torch.__version__, transformers.__version__)
        fingerprint = hash_plain([*versions, tokens.pad_to_max, *parts, *(["masks padding"] * masks_padding)])
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

    @functools.cached_property
    def _stored(self) -> dict[str, Rows | RowsOfVectors]:
        """The columns, read from the memory-mapped file."""
        table = self.dataset.with_format("arrow")[:]
        return {
            name: RowsOfVectors(table.column(name)) if name == "states" else Rows(table.column(name))
            for name in table.column_names
        }

    def __getstate__(self) -> dict[str, Any]:
        """Workers that do not share the memory of this process open the file themselves."""
        return {name: value for name, value in vars(self).items() if name != "_stored"}

    def distinct(self, number: int) -> dict[str, torch.Tensor]:
        stored = torch.tensor(self._stored["states"][number])
        states = stored.new_zeros(self.length, stored.shape[1])
        states[: len(stored)] = stored
        result = {"caption_states": states}
        if not self.pad_to_max or self.masks_padding:
            result["caption_mask"] = (torch.arange(self.length) < len(stored)).long()
        if "pooled" in self._stored:
            result["caption_pooled"] = torch.tensor(self._stored["pooled"][number])
        return result
