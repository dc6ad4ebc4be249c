"""Networks that stay as they are while another one is trained on top of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..data.fingerprints import hash_tensors


class FrozenNetworks:
    """
    Freezes networks and verifies at the end of a run that they have not changed. Registered with
    `accelerator.register_for_checkpointing`, it keeps their hashes in checkpoints, so that a run can only be resumed
    with the same networks.

    Args:
        networks (mapping of `torch.nn.Module`): By their names in messages.
    """

    def __init__(self, networks: Mapping[str, torch.nn.Module]):
        self.networks = networks
        for network in networks.values():
            network.requires_grad_(False).eval()
        self.hashes = self._hash()

    def _hash(self) -> dict[str, str]:
        return {name: hash_tensors(network.state_dict()) for name, network in self.networks.items()}

    def check(self) -> None:
        """Raises a `RuntimeError` if a weight has changed. It hashes all weights, so call it once, at the end."""
        changed = [name for name, now in self._hash().items() if now != self.hashes[name]]
        if changed:
            raise RuntimeError(
                f"Weights of the frozen {' and '.join(changed)} have changed during training. The result, which does "
                "not match the pretrained model, is not saved; do not use the checkpoints. Please report this."
            )

    def state_dict(self) -> dict[str, str]:
        return dict(self.hashes)

    def load_state_dict(self, state_dict: Mapping[str, str]) -> None:
        """Refuses a checkpoint that was trained with other frozen weights."""
        if dict(state_dict) != self.hashes:
            before, now = (", ".join(map(" ".join, hashes.items())) for hashes in (state_dict, self.hashes))
            raise ValueError(
                f"The checkpoint was trained with the frozen {before}, but this run has {now}. Resume it with the "
                "`pretrained_model_name_or_path` that it was started with, or start a new run."
            )
