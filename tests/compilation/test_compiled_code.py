"""The real compiler, in its own process, and a second process that finds its code. See test_fast_network.py."""

import os
import subprocess
import sys

import pytest
import torch
from toy_models import random_unet

from diffusers_adm import AdaGNUNet2DModel, ADMPipeline, LearnedVarianceDDPMScheduler
from diffusers_adm.compilation import cpu
from diffusers_adm.compilation.code_cache import CODE, RECORD


pytestmark = pytest.mark.skipif(cpu.find_compiler() is None, reason="no C++ compiler")

# Generates with a saved pipeline, and prints how many shapes were compiled and how many were found in the cache.
SECOND_PROCESS = """
import sys, torch
from diffusers_adm import ADMPipeline
torch.set_num_threads(int(sys.argv[4]))
pipe = ADMPipeline.from_pretrained(sys.argv[1])
pipe.enable_fast(cache_dir=sys.argv[2])
images = pipe(num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(0)).images
torch.save(images, sys.argv[3])
print(pipe.unet._compiled_call_impl.num_compiled, pipe.unet._compiled_call_impl.num_loaded)
"""


@pytest.mark.slow
def test_a_second_process_compiles_nothing(tmp_path, monkeypatch):
    # Without optimisation the compiler is faster.
    monkeypatch.setenv("AOT_INDUCTOR_DEBUG_COMPILE", "1")
    unet: AdaGNUNet2DModel = random_unet(
        block_out_channels=(8,), down_block_types=("AttnDownBlock2D",), up_block_types=("AttnUpBlock2D",)
    )
    pipe = ADMPipeline(unet.eval(), LearnedVarianceDDPMScheduler(num_train_timesteps=20), None, None, None, None)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "saved")

    def generate():
        return pipe(num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(0)).images

    slow = generate()
    pipe.enable_fast(cache_dir=tmp_path / "cache")
    fast = generate()
    assert unet._compiled_call_impl.num_compiled == 1
    assert sorted(path.name for path in (tmp_path / "cache").glob("*/*")) == [RECORD, CODE]  # nothing temporary is left
    # Other kernels add up in another order: some 1e-6 for each pass.
    torch.testing.assert_close(fast, slow, rtol=1e-3, atol=1e-4)

    arguments = [tmp_path / "saved", tmp_path / "cache", tmp_path / "images.pt", torch.get_num_threads()]
    done = subprocess.run(
        [sys.executable, "-c", SECOND_PROCESS, *map(str, arguments)],
        env=os.environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "1"]
    assert "Compiling" not in done.stderr
    # The same code; but products of matrices may differ in their last bits between two processes.
    torch.testing.assert_close(torch.load(tmp_path / "images.pt", weights_only=True), fast, rtol=1e-4, atol=1e-5)


def test_what_the_compiler_says_is_in_the_error(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", sys.executable)  # no compiler of C++
    monkeypatch.setattr(cpu, "REQUEST", "other.pt")  # the process finds no request
    pipe = ADMPipeline(random_unet().eval(), LearnedVarianceDDPMScheduler(), None, None, None, None)
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_fast(cache_dir=tmp_path)
    with pytest.raises(RuntimeError, match=r"could not be compiled.*disable_fast(.|\n)*No such file"):
        pipe(num_inference_steps=1)
    assert not list(tmp_path.iterdir())  # nothing is left
    pipe.disable_fast()
    pipe(num_inference_steps=1, output_type="latent")
