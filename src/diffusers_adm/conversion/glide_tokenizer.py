"""
GLIDE's tokenizer: byte-pair encoding with GPT-2's vocabulary (Radford et al. 2019), of lower-case text.

It differs from GPT-2's tokenizer around the byte pairs: text becomes lower case, and `<|endoftext|>` is the padding
token, which no text can contain. The two files are GPT-2's; this package does not include them.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast


# Names of the vocabulary and of the merges: those of transformers and those of GPT-2's code, compressed or not.
FILE_NAMES = tuple(
    (f"{vocabulary}{suffix}", f"{merges}{suffix}")
    for vocabulary, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
    for suffix in ("", ".gz")
)
# How GPT-2's code splits a text before it merges byte pairs.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The one rule of Python's `str.lower` that depends on context: a sigma after a letter and before none is a final one
# (Unicode, section 3.13). `\K`: what precedes it is matched, but not replaced.
_LETTER = r"[\p{Cased}&&\P{Case_Ignorable}]"
FINAL_SIGMA = rf"{_LETTER}\p{{Case_Ignorable}}*\KΣ(?!\p{{Case_Ignorable}}*{_LETTER})"


def load_glide_tokenizer(name_or_path: str | Path, max_length: int = 128) -> PreTrainedTokenizerFast:
    """
    Builds GLIDE's tokenizer from the files of GPT-2's.

    Args:
        name_or_path (`str` or `Path`): A folder with `vocab.json` and `merges.txt` or, as in GPT-2's and GLIDE's code,
            `encoder.json` and `vocab.bpe`, each also with `.gz`; or a byte-pair tokenizer of transformers, in a folder
            or on the Hub.
        max_length (`int`, defaults to 128): GLIDE's `text_ctx`, the length of all captions in tokens.

    Returns:
        [`~transformers.PreTrainedTokenizerFast`]: Adds no special tokens; pads on the right with the last token of the
        vocabulary, where the attention mask is 0. Upper-case letters that are newer than the Unicode version of a
        Python become lower case here, but not in GLIDE's code on that Python.
    """
    vocabulary, merges = _read_files(Path(name_or_path)) or _read_tokenizer(str(name_or_path))
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise ValueError(f"The {len(vocabulary)} tokens of {name_or_path} are not numbered from 0 without gaps.")
    padding = max(vocabulary, key=vocabulary.__getitem__)
    tokenizer = Tokenizer(models.BPE(vocab=dict(vocabulary), merges=[(first, second) for first, second in merges]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(Regex(FINAL_SIGMA), "ς"), normalizers.Lowercase()])
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        pad_token=padding,
        padding_side="right",
        truncation_side="right",
        # "<|endoftext|>" in a caption means these characters, not the token.
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def _read_files(folder: Path) -> tuple[Mapping[str, int], Sequence[Sequence[str]]] | None:
    for names in FILE_NAMES:
        files = [folder / name for name in names]
        if all(file.is_file() for file in files):
            try:
                vocabulary = json.loads(_read_text(files[0]))
                lines = _read_text(files[1]).split("\n")
            except (ValueError, OSError, EOFError) as error:
                raise ValueError(f"{' and '.join(names)} in {folder} cannot be read: {error}") from error
            merges = [line.split() for line in lines if line and not line.startswith("#version")]
            if not isinstance(vocabulary, dict) or any(
                len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary.keys() for pair in merges
            ):
                raise ValueError(f"{' and '.join(names)} in {folder} are not a vocabulary and pairs of its tokens.")
            return vocabulary, merges
    return None


def _read_text(file: Path) -> str:
    data = file.read_bytes()
    return (gzip.decompress(data) if file.suffix == ".gz" else data).decode("utf-8")


def _read_tokenizer(name_or_path: str) -> tuple[Mapping[str, int], Sequence[Sequence[str]]]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        expected = " or ".join(" and ".join(names) for names in FILE_NAMES)
        raise ValueError(f"{name_or_path!r} holds neither a tokenizer nor {expected}: {error}") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())["model"]
    if model.get("type") != "BPE" or any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix")):
        raise ValueError(
            f"The tokenizer in {name_or_path!r}, a {type(tokenizer).__name__}, is not a byte-pair tokenizer like "
            "GPT-2's. Pass GPT-2's."
        )
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    return model["vocab"], pairs
