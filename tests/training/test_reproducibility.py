"""The description of the machine in the log of a run, and the search for operations that depend on memory."""

import logging

import pytest
import torch
from accelerate import Accelerator
from jitter import Jitter
from runs import reset_accelerate

from diffusers_adm.training.reproducibility import (
    depends_on_memory,
    describe_machine,
    operations_that_depend_on_memory,
    report_machine,
)


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    reset_accelerate()


def test_operations_on_real_tensors():
    """The wrong one reads where its operand lies, as a kernel does that treats unaligned beginnings apart."""
    a, b = torch.randn(8, 30), torch.randn(30, 20)
    assert not depends_on_memory(torch.add, a, a)
    assert not depends_on_memory(lambda x: x * (x.data_ptr() % 64 == 0), a)  # torch aligns to 64 bytes

    def by_page(x, y):
        return x @ y + 1e-6 * (y.data_ptr() % 128 == 0)

    assert depends_on_memory(by_page, a, b)
    assert torch.equal(a, a.clone())


@pytest.mark.no_jitter("makes a machine of its own that cannot keep the promise")
def test_a_machine_that_cannot_resume_exactly_says_so(accelerator, caplog):
    with caplog.at_level(logging.INFO, logger="diffusers_adm"), Jitter(0):
        assert {"matrix products", "3x3 convolutions"} <= set(operations_that_depend_on_memory())
        report_machine(accelerator)
    [info, warning] = caplog.records
    assert info.getMessage() == f"Machine: {describe_machine()}"
    assert warning.levelname == "WARNING"
    assert "only up to rounding" in warning.getMessage()
    assert "MKL_CBWR=COMPATIBLE" in warning.getMessage()


@pytest.mark.no_jitter("the log of an exact machine")
def test_a_machine_that_can_says_nothing(accelerator, caplog):
    if operations_that_depend_on_memory():
        pytest.skip("not on this machine")
    with caplog.at_level(logging.INFO, logger="diffusers_adm"):
        report_machine(accelerator)
    assert len(caplog.records) == 1


def test_the_machine_is_described(monkeypatch):
    monkeypatch.setenv("MKL_CBWR", "AVX2")
    text = describe_machine()
    assert f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, " in text
    assert f"{torch.get_num_threads()} threads, MKL_CBWR=AVX2" in text
