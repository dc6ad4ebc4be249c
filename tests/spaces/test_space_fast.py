"""`--fast` of the Space, with the real compiler and toy networks."""

import subprocess
import sys

import numpy as np
import pytest
from app import build, read_switch
from space_app import APP
from space_models import Models, Recipe
from toy_models import random_text_encoder, random_text_unet, toy_tokenizer

from diffusers_adm import ADMPipeline, LearnedVarianceDDPMScheduler
from diffusers_adm.compilation import cpu


needs_compiler = pytest.mark.skipif(cpu.find_compiler() is None, reason="no C++ compiler")
RECIPE = Recipe("red cat", guidance_scale=2.0, steps=4, seed=3, num_images=1)


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    """One network with one level, which compiles in less time."""
    folder = tmp_path_factory.mktemp("small")
    level = {"block_out_channels": (8,), "mid_block_type": None}
    blocks = {"down_block_types": ("SimpleCrossAttnDownBlock2D",), "up_block_types": ("SimpleCrossAttnUpBlock2D",)}
    unet = random_text_unet("added_kv", **level, **blocks)
    text = {"text_encoder": random_text_encoder(), "tokenizer": toy_tokenizer()}
    pipe = ADMPipeline(unet, LearnedVarianceDDPMScheduler(), vae=None, classifier=None, **text)
    pipe.save_pretrained(folder / "base")
    return folder


@pytest.fixture(autouse=True)
def quick_compiler(monkeypatch):
    monkeypatch.setenv("AOT_INDUCTOR_DEBUG_COMPILE", "1")  # without optimisation


def assert_same_up_to_rounding(image, other):
    # The kernels add up in another order: some 1e-6 for each pass, while a level of 8 bits is 8e-3 wide.
    difference = np.abs(np.asarray(image).astype(int) - np.asarray(other).astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.05


@needs_compiler
@pytest.mark.slow
def test_images_before_and_after_compiling(small_folder):
    (slow,) = Models(small_folder, device="cpu").generate(RECIPE, lambda step: None)
    models = Models(small_folder, device="cpu", fast=True)
    runner = models.base.unet._compiled_call_impl
    assert runner.background
    (before,) = models.generate(RECIPE, lambda step: None)
    runner.wait()
    calls = []
    code = next(iter(runner._code.values()))
    runner._code = {key: lambda *tensors: calls.append(1) or code(*tensors) for key in runner._code}
    (after,) = models.generate(RECIPE, lambda step: None)
    assert (runner.num_compiled, runner.num_loaded) == (1, 0)
    assert len(calls) == 2 * RECIPE.steps  # with and without the prompt
    assert_same_up_to_rounding(before, slow)
    assert_same_up_to_rounding(after, slow)
    models.close()
    assert models.base.unet._compiled_call_impl is None


def test_the_page_says_that_images_may_differ_by_rounding(models_folder):
    models = Models(models_folder, device="cpu")
    texts = []
    for is_fast in (False, True):
        models.is_fast = is_fast
        texts.append(str(build(models).get_config_file()))
    assert ["up to rounding" in text for text in texts] == [False, True]


class TestRefused:
    def test_a_network_that_cannot_be_compiled(self, small_folder):
        models = Models(small_folder, device="cpu")
        models.base.unet.hf_device_map = {"conv_in": 0, "conv_out": 1}
        with pytest.raises(ValueError, match="`base/` cannot be compiled.*`unet` is spread over devices"):
            models._enable_fast()

    def test_other_devices(self, small_folder):
        with pytest.raises(ValueError, match="`base/` is on meta. .* on CPUs only: start without --fast"):
            Models(small_folder, device="meta", fast=True)

    def test_no_compiler(self, small_folder, tmp_path, monkeypatch):
        monkeypatch.setenv("CXX", "no-such-compiler")
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        command = [sys.executable, str(APP), "--models", str(small_folder), "--fast"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 2
        assert "--fast: `enable_fast` compiles C++, but there is no compiler: `no-such-compiler`" in done.stderr
        assert "Traceback" not in done.stderr

    def test_a_switch_that_is_neither_on_nor_off(self, monkeypatch):
        for value, is_on in (("1", True), ("0", False), ("", False)):
            monkeypatch.setenv("ADM_SPACE_FAST", value)
            assert read_switch("ADM_SPACE_FAST") == is_on
        monkeypatch.setenv("ADM_SPACE_FAST", "yes")
        with pytest.raises(ValueError, match="ADM_SPACE_FAST is 'yes'. It must be 1"):
            read_switch("ADM_SPACE_FAST")
