"""Hashes of the parts of a pipeline, which tell whether two are the same wherever they were saved."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch


# Keys of a saved config that say how it was saved.
SAVED_KEYS = ("model_type", "architectures", "transformers_version", "dtype", "torch_dtype")
# Keys that describe the training of a network, which pipelines check; they do not change what the network computes.
TRAINED_ON_KEYS = ("noise_schedule",)
DIGEST_SIZE = 16  # bytes


def hash_plain(value: Any) -> str:
    """Hashes a JSON value to 32 hexadecimal digits; other objects in it are hashed as `str` prints them."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_SIZE).hexdigest()


def hash_texts(texts: Iterable[str] | Iterable[Sequence[str]]) -> str:
    """Hashes texts, or lists of them, and their order, one after the other, to 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=DIGEST_SIZE)
    for text in texts:
        digest.update(json.dumps(text).encode())
    return digest.hexdigest()


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """
    Hashes names, shapes, dtypes and values of tensors on any device.

    Args:
        tensors (mapping of `torch.Tensor`): For instance, a `state_dict`. Its order matters.

    Returns:
        `str`: 32 hexadecimal digits.
    """
    digest = hashlib.blake2b(digest_size=DIGEST_SIZE)
    for name, tensor in tensors.items():
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_config(model: Any) -> str:
    """
    Hashes a model's class and its config, except for where and how it was saved and its noise schedule in training.

    Args:
        model: A model of diffusers or transformers.

    Returns:
        `str`: 32 hexadecimal digits.
    """
    config = model.config if isinstance(model.config, Mapping) else model.config.to_dict()
    left_out = (*SAVED_KEYS, *TRAINED_ON_KEYS)
    settings = {key: value for key, value in config.items() if key not in left_out and not key.startswith("_")}
    model = getattr(model, "_orig_mod", model)  # inside the wrapper of `torch.compile`
    return hash_plain([type(model).__name__, settings])


def hash_tokenizer(tokenizer: Any) -> str:
    """
    Hashes everything that decides which tokens a prompt becomes, the maximum length included. Using a tokenizer does
    not change its hash.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Fast or slow.

    Returns:
        `str`: 32 hexadecimal digits.
    """
    rules = None  # the rules of slow tokenizers are their code
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        for key in ("truncation", "padding"):  # left over from the latest call
            del rules[key]
    sides = [tokenizer.padding_side, tokenizer.truncation_side]
    tokens = [tokenizer.get_vocab(), tokenizer.special_tokens_map]
    return hash_plain([tokenizer.model_max_length, sides, tokens, rules])
