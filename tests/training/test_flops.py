"""Operations of a training step: against their formula, without an influence on the numbers; peaks of devices."""

import contextlib

import pytest
import torch
from accelerate import Accelerator
from runs import (
    EMOJI,
    SHORT_RUN,
    assert_same_checkpoint,
    bit_by_bit,
    flags,
    own_process_state,
    read_metrics,
    reset_accelerate,
)
from scripts import load_script
from test_train_adm import write_model_config
from torch.utils.flop_counter import FlopCounterMode
from toy_models import random_unet

from diffusers_adm.training.flops import FlopMeter, peak_tflops


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    reset_accelerate()


def test_products_and_convolutions_by_their_formula(accelerator):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(8 * 16, 5))
    images, meter = torch.randn(2, 3, 4, 4), FlopMeter(accelerator)
    with meter.count():
        network(images).sum().backward()
    convolution = 2 * (2 * 16) * 8 * (3 * 9)  # a product and a sum each
    linear = 2 * 2 * 5 * 128
    # Backward, each layer has the gradient of its weights, and all but the first that of its input.
    assert meter.flops == 2 * convolution + 3 * linear
    with meter.count():  # once
        network(images).sum().backward()
    assert meter.flops == 2 * convolution + 3 * linear


def test_rates(accelerator):
    meter = FlopMeter(accelerator)
    assert meter.rates(4, 2.0, 1) == {}
    meter.flops = 10**12
    assert meter.rates(batches=4, seconds=2.0, num_processes=3) == {"tflops_per_second": 6.0}  # no peak of a CPU
    meter.peak = 100.0
    assert meter.rates(batches=4, seconds=2.0, num_processes=3) == {"tflops_per_second": 6.0, "mfu": 0.02}


@pytest.mark.parametrize(
    ("name", "precision", "tf32", "peak"),
    [
        ("NVIDIA H200", "bf16", True, 989.4),
        ("NVIDIA H100 80GB HBM3", "no", True, 494.7),
        ("NVIDIA H100 80GB HBM3", "no", False, 66.9),
        ("NVIDIA H100 PCIe", "fp16", True, 756.0),
        ("NVIDIA A100-SXM4-40GB", "bf16", True, 312.0),
        ("NVIDIA A10", "bf16", True, 125.0),
        ("NVIDIA L40S", "bf16", True, 362.0),
        ("NVIDIA L4", "bf16", True, 121.0),
        ("Tesla V100-SXM2-16GB", "fp16", True, 125.0),
        ("Tesla V100-SXM2-16GB", "no", True, 15.7),
        # Not known: parts of a device, others with a similar name, no such units.
        ("NVIDIA H200 MIG 1g.18gb", "bf16", True, None),
        ("NVIDIA A10G", "bf16", True, None),
        ("NVIDIA GeForce RTX 3090 Ti", "bf16", True, None),
        ("Tesla V100-SXM2-16GB", "bf16", True, None),
        ("NVIDIA GeForce GTX 1080", "fp16", True, None),
    ],
)
def test_peaks(name, precision, tf32, peak):
    assert peak_tflops(name, precision, tf32) == peak


def test_the_count_changes_no_bit(tmp_path, monkeypatch):
    """Also with dropout, whose random numbers are those of the step."""
    train_adm = load_script("train_adm")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    arguments = SHORT_RUN | {"model_config_name_or_path": write_model_config(tmp_path), "data_files": EMOJI}
    arguments |= {"max_train_samples": 16, "learning_rate": 1e-3, "num_validation_images": 1}
    with own_process_state("train_adm"):
        train_adm.main(flags(**arguments, output_dir=tmp_path / "counted"))
        reset_accelerate()
        monkeypatch.setattr(FlopMeter, "rates", lambda *args: {})
        monkeypatch.setattr(FlopMeter, "count", lambda self, share: contextlib.nullcontext())
        train_adm.main(flags(**arguments, output_dir=tmp_path / "not"))
    rows = read_metrics(tmp_path / "counted", without=())
    assert all(row["tflops_per_second"] > 0 and "mfu" not in row for row in rows)
    assert not any("tflops_per_second" in row for row in read_metrics(tmp_path / "not", without=()))
    assert read_metrics(tmp_path / "counted") == read_metrics(tmp_path / "not")
    assert_same_checkpoint(tmp_path / "counted" / "checkpoint-2", tmp_path / "not" / "checkpoint-2")


def test_the_count_keeps_every_bit_and_agrees_with_that_of_torch(accelerator):
    network, meter = random_unet(), FlopMeter(accelerator)
    images = torch.randn(2, 3, 8, 8)

    def gradients(counting):
        network.zero_grad()
        with counting:
            network(images, 10).sample.square().mean().backward()
        return [parameter.grad.clone() for parameter in network.parameters()]

    plain = gradients(contextlib.nullcontext())
    counted = gradients(meter.count())
    with bit_by_bit():
        assert all(map(torch.equal, plain, counted))
    with FlopCounterMode(display=False) as reference:
        network(images, 10).sample.square().mean().backward()
    assert meter.flops == reference.get_total_flops() > 10**6
    whole, part = meter.flops, FlopMeter(accelerator)
    with part.count(share=0.5):  # one of the two images: the other one did not fit in memory
        network(images[:1], 10).sample.square().mean().backward()
    assert part.flops == whole
