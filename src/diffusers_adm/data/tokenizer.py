"""
Trains a tokenizer on the captions of a dataset, for a text encoder that is trained from scratch with a U-Net.

    python -m diffusers_adm.training.tokenizer --data_files data/noto-emoji-32/train.parquet --caption_column text \
        --vocab_size 2048 --model_max_length 32 --output_dir runs/emoji-tokenizer

Captions are lower-cased, split at spaces and punctuation, then into WordPiece
(https://huggingface.co/papers/1609.08144) or byte-pair (https://huggingface.co/papers/1508.07909) units, and become
`<bos> ... <eos>`. `AutoTokenizer` loads the result.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ..commands.arguments import arg, check_at_least, parse_args
from ..commands.errors import run_command
from .columns import read_captions
from .repositories import check_can_be_written
from .sources import load_source


logger = logging.getLogger("diffusers_adm.training.tokenizer")

Algorithm = Literal["wordpiece", "bpe"]
# The order gives the ids. <eos> is not 2: transformers takes CLIP configs with `eos_token_id` 2 for files from before
# 2023, and looks for the end of a caption at its highest id.
PAD, UNK, BOS, EOS = SPECIAL_TOKENS = ("<pad>", "<unk>", "<bos>", "<eos>")


@dataclass
class TokenizerArguments:
    caption_column: str = arg("text", "Column of the captions: texts, or lists of texts, all of which are used.")
    dataset_name: str | None = arg(None, "Dataset on the Hub, or path of a local copy.")
    dataset_config_name: str | None = arg(None, "Configuration of `dataset_name`.")
    train_data_dir: str | None = arg(None, "Folder of images, with captions in a metadata file or next to them.")
    data_files: list[str] | None = arg(None, "Parquet files.")
    split: str = arg("train", "Split of the dataset.")
    cache_dir: str | None = arg(None, "Cache folder of the datasets; default: that of the `datasets` library.")
    algorithm: Algorithm = arg("wordpiece", "Algorithm that splits words into units.")
    vocab_size: int = arg(2048, "Maximum number of tokens, special tokens included.")
    model_max_length: int = arg(32, "Maximum length of a caption in tokens, <bos> and <eos> included.")
    output_dir: str = arg("tokenizer", "Folder for the tokenizer.")

    def __post_init__(self):
        check_at_least(self, len(SPECIAL_TOKENS) + 1, "vocab_size")
        check_at_least(self, 3, "model_max_length")


def train_tokenizer(
    captions: Sequence[str], vocab_size: int, model_max_length: int, algorithm: Algorithm = "wordpiece"
) -> PreTrainedTokenizerFast:
    """
    Trains a tokenizer.

    Args:
        captions (sequence of `str`): The training text.
        vocab_size (`int`): Maximum number of tokens, special tokens included.
        model_max_length (`int`): Maximum length of a caption in tokens, `<bos>` and `<eos>` included.
        algorithm (`str`, defaults to `"wordpiece"`): Or `"bpe"`.

    Raises:
        ValueError: For an unknown algorithm, or if `vocab_size` is too small for the special tokens and the single
            characters of the captions.
    """
    options: dict[str, Any] = {"vocab_size": vocab_size, "special_tokens": list(SPECIAL_TOKENS), "show_progress": False}
    if algorithm == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token=UNK))
        tokenizer.decoder = decoders.WordPiece(cleanup=False)
        trainer = trainers.WordPieceTrainer(**options)
    elif algorithm == "bpe":
        tokenizer = Tokenizer(models.BPE(unk_token=UNK, end_of_word_suffix="</w>"))
        tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
        trainer = trainers.BpeTrainer(**options, end_of_word_suffix="</w>")
    else:
        raise ValueError(f"`algorithm` is {algorithm!r}; it must be 'wordpiece' or 'bpe'.")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(captions, trainer)
    if tokenizer.get_vocab_size() > vocab_size:
        raise ValueError(
            f"`vocab_size` is {vocab_size}, but the special tokens and the single characters of these captions already "
            f"need {tokenizer.get_vocab_size()} tokens. Pass at least that."
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(token, tokenizer.token_to_id(token)) for token in (BOS, EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=model_max_length,
        pad_token=PAD,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
    )


def main(argv: list[str] | None = None) -> None:
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    (args,) = parse_args(TokenizerArguments, argv, description=__doc__)
    check_can_be_written("output_dir", args.output_dir)
    dataset, source = load_source(
        args.dataset_name,
        args.dataset_config_name,
        args.train_data_dir,
        args.data_files,
        args.split,
        args.cache_dir,
        caption_column=args.caption_column,
    )
    captions = []
    for caption in read_captions(dataset, source, args.caption_column):
        captions += [caption] if isinstance(caption, str) else caption
    tokenizer = train_tokenizer(captions, args.vocab_size, args.model_max_length, args.algorithm)
    tokenizer.save_pretrained(args.output_dir)
    lengths = [len(ids) for ids in tokenizer(captions, truncation=False, verbose=False)["input_ids"]]
    cut = sum(length > args.model_max_length for length in lengths)
    print(
        f"{len(tokenizer)} tokens from {len(captions)} captions, saved to {args.output_dir}. A caption has "
        f"{sum(lengths) / len(lengths):.1f} tokens on average and {max(lengths)} at most; {cut} of them exceed "
        f"`model_max_length` ({args.model_max_length})."
    )


if __name__ == "__main__":
    run_command(main)
