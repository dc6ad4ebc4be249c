"""What `tests/conftest.py` promises to every test, seen from inside one."""

import os
import random

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch


def test_nothing_reaches_a_network():
    constants = huggingface_hub.constants
    assert constants.HF_HUB_OFFLINE
    assert constants.HF_HUB_DISABLE_TELEMETRY
    assert datasets.config.HF_HUB_OFFLINE
    with pytest.raises(huggingface_hub.errors.OfflineModeIsEnabled, match="offline mode is enabled"):
        huggingface_hub.model_info("google/ddpm-cifar10-32")


def test_caches_and_tokens_are_not_the_users():
    constants = huggingface_hub.constants
    for path in (constants.HF_HUB_CACHE, constants.HF_TOKEN_PATH, datasets.config.HF_DATASETS_CACHE):
        assert str(path).startswith(os.environ["HF_HOME"])
    assert huggingface_hub.get_token() is None


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="a lone process may use every core")
def test_workers_use_one_thread():
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("repetition", [1, 2])
def test_random_numbers_start_afresh(repetition):
    # The first number of each generator after its seed was set to 0.
    assert random.random() == random.Random(0).random()
    assert np.random.random() == np.random.RandomState(0).random_sample()  # noqa: NPY002 (the global state is tested)
    assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(0))
