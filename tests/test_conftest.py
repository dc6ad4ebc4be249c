"""What `tests/conftest.py` promises to every test, seen from inside one."""

import os
import random
import warnings

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from jitter import Jitter
from toy_models import random_unet


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


def test_the_header_tells_where_the_tests_run(request, monkeypatch):
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    config = request.config
    header = config.hook.pytest_report_header(config=config, start_path=config.rootpath)
    text = "\n".join(line for lines in header for line in ([lines] if isinstance(lines, str) else lines))
    assert f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, threads" in text
    assert "MKL_CBWR=COMPATIBLE" in text
    assert "processor: " in text


def warn_in(module, category):
    """The warning of a line of `module`."""
    exec(compile(f"import warnings; warnings.warn('old', {category})", module, "exec"), {"__name__": module})


@pytest.mark.parametrize("category", ["DeprecationWarning", "FutureWarning"])
class TestDeprecations:
    @pytest.mark.parametrize(
        "module",
        [
            "diffusers_adm",
            "diffusers_adm.pipelines.pipeline_adm",
            "diffusers_adm.ops.conv",
            "train_adm",
            "space_models",
        ],
    )
    def test_ours_fail(self, module, category):
        with pytest.raises((DeprecationWarning, FutureWarning), match="old"):
            warn_in(module, category)

    @pytest.mark.parametrize("module", ["numpy", "diffusers.schedulers.scheduling_ddim", "torch.jit", "gradio.blocks"])
    def test_those_of_others_are_silent(self, module, category):
        with warnings.catch_warnings(record=True) as caught:
            warn_in(module, category)
        assert caught == []

    def test_those_of_a_test_are_shown(self, category):
        with pytest.warns((DeprecationWarning, FutureWarning), match="old"):
            warn_in("test_of_something", category)


class TestJitter:
    def test_two_calls_differ_by_rounding(self):
        unet, image = random_unet(), torch.randn(1, 3, 8, 8, requires_grad=True)
        outputs, gradients = [], []
        with Jitter(0):
            for _ in range(2):
                outputs.append(unet(image, 5).sample)
                gradients.append(torch.autograd.grad(outputs[-1].square().sum(), image)[0])
        for first, second in (outputs, gradients):
            assert 0 < (first - second).abs().max() < 1e-4 * first.abs().max()

    def test_what_is_exact_everywhere_remains(self):
        numbers, whole = torch.randn(50, 50), torch.randint(-9, 9, (50, 50)).float()
        with Jitter(0):
            for _ in range(5):
                assert torch.equal(numbers @ torch.zeros(50, 50), torch.zeros(50, 50))
                assert torch.equal((whole @ whole).long(), whole.long() @ whole.long())
                assert torch.equal(numbers.clone() * 3, numbers * 3)
                assert whole.sum() == whole.long().sum()
