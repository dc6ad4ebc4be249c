"""Hashes of the parts of a pipeline: whether two are the same, wherever they were saved and under whatever name."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch


# Keys of a saved config that say how it was saved, not what it describes.
SAVED_KEYS = ("model_type", "architectures", "transformers_version", "dtype", "torch_dtype")
# And one that says what a network was trained on, which pipelines check: it does not change what the network computes.
TRAINED_ON_KEYS = ("noise_schedule",)
DIGEST_SIZE = 16  # bytes


def hash_plain(value: Any) -> str:
    """A hash, 32 hexadecimal digits, of a value that JSON can hold; of objects in it, that of the text `str` gives."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_SIZE).hexdigest()


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """
    A hash of names, shapes, dtypes and values, wherever the tensors are.

    Args:
        tensors (mapping of `torch.Tensor`): A `state_dict`, for instance. The order counts.

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
    A hash of a model's class and of its config but for what says where it lies, how it was saved and on which noise
    schedule it was trained.

    Args:
        model: Of diffusers or of transformers.

    Returns:
        `str`: 32 hexadecimal digits.
    """
    config = model.config if isinstance(model.config, Mapping) else model.config.to_dict()
    left_out = (*SAVED_KEYS, *TRAINED_ON_KEYS)
    settings = {key: value for key, value in config.items() if key not in left_out and not key.startswith("_")}
    model = getattr(model, "_orig_mod", model)  # below what `torch.compile` wraps around it
    return hash_plain([type(model).__name__, settings])


def hash_tokenizer(tokenizer: Any) -> str:
    """
    A hash of what decides which tokens a prompt becomes, the greatest length included. A tokenizer that has been used
    has the hash of a new one.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): A fast one or a slow one.

    Returns:
        `str`: 32 hexadecimal digits.
    """
    rules = None  # those of slow ones are their code
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
