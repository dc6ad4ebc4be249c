"""Hashes of the parts of a pipeline, which tell whether two are the same wherever they were saved."""

import hashlib
import json
from collections.abc import Mapping
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


class FrozenNetworks:
    """
    Freezes networks beside which another one is trained, and vouches for them. Registered with
    `accelerator.register_for_checkpointing`, it keeps their hashes in checkpoints, so that a run is resumed beside the
    same ones.

    Args:
        networks (mapping of `torch.nn.Module`): By the names that errors call them.
    """

    def __init__(self, networks: Mapping[str, torch.nn.Module]):
        self.networks = networks
        for network in networks.values():
            network.requires_grad_(False).eval()
        self.hashes = self._hash()

    def _hash(self) -> dict[str, str]:
        return {name: hash_tensors(network.state_dict()) for name, network in self.networks.items()}

    def check(self) -> None:
        """
        Raises:
            RuntimeError: If a weight is not what it was.
        """
        changed = [name for name, now in self._hash().items() if now != self.hashes[name]]
        if changed:
            raise RuntimeError(
                f"Weights of the frozen {' and '.join(changed)} have changed during training, so what was trained "
                "beside them does not fit those that were loaded. It is not saved; the checkpoints are sound. Please "
                "report this."
            )

    def state_dict(self) -> dict[str, str]:
        return dict(self.hashes)

    def load_state_dict(self, state_dict: Mapping[str, str]) -> None:
        """
        Raises:
            ValueError: If the checkpoint was written beside other weights.
        """
        if dict(state_dict) != self.hashes:
            raise ValueError(
                f"The checkpoint was written beside a frozen {_list_hashes(state_dict)}, but this run has "
                f"{_list_hashes(self.hashes)}. Resume it with the `pretrained_model_name_or_path` that it was begun "
                "with, or start anew."
            )


def _list_hashes(hashes: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in hashes.items())
