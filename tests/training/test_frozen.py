"""Networks that are not trained: frozen, verified, and compared when a run is resumed."""

import pytest
import torch
from toy_models import random_unet

from diffusers_adm.training import FrozenNetworks


def test_frozen_networks():
    networks = {"first": random_unet().train(), "second": torch.nn.BatchNorm2d(3)}
    frozen = FrozenNetworks(networks)
    assert not any(network.training for network in networks.values())
    assert not any(p.requires_grad for network in networks.values() for p in network.parameters())
    frozen.check()
    saved = frozen.state_dict()
    frozen.load_state_dict(saved)

    networks["second"].running_mean[1] = 1e-6  # a buffer is part of the network
    with pytest.raises(RuntimeError, match="Weights of the frozen second have changed during training"):
        frozen.check()
    other = FrozenNetworks(networks)
    message = f"with the frozen .*second {saved['second']}, but this run has .*second {other.hashes['second']}"
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(saved)
