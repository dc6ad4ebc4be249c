"""
The first 30 losses of every training script against stored ones, so that no change of the mathematics is silent. After
an intended change, `python tests/training/golden_losses.py` writes them anew.
"""

import json

import golden_losses
import pytest
from runs import own_process_state

from diffusers_adm.training import losses


GOLDEN = json.loads(golden_losses.PATH.read_text(encoding="utf-8"))
# Relative errors. Two runs on one machine agree in all stored digits. With other kernels (ATEN_CPU_CAPABILITY=avx2,
# ONEDNN_MAX_CPU_ISA=AVX2, MKL_CBWR=COMPATIBLE) and with `--jitter`, the largest differences over 30 steps were 2.5e-6
# (the loss of the autoencoder, which includes that of its opponent; other terms 1.6e-6), and 1.1e-5 for the terms of
# opponents. Eight times as much is allowed; a weight that is off by 2% changes its term by 2%.
TOLERANCE, OF_OPPONENTS = 2e-5, 1e-4
# The loss of a discriminator falls to small numbers, and the weight is a quotient of gradients.
SENSITIVE = ("discriminator_loss", "adaptive_weight")


def check(script, folder, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with own_process_state(script):
        found = golden_losses.losses_of(script, folder)
    assert found.keys() == GOLDEN[script].keys()
    for name, values in found.items():
        tolerance = OF_OPPONENTS if name in SENSITIVE else TOLERANCE
        expected = [value if value is None else pytest.approx(value, rel=tolerance) for value in GOLDEN[script][name]]
        assert values == expected, f"{name} of {script}"


@pytest.mark.parametrize("script", golden_losses.SCRIPTS)
def test_losses(script, tmp_path, monkeypatch):
    assert len(GOLDEN[script]["loss"]) == golden_losses.NUM_STEPS
    check(script, tmp_path, monkeypatch)


def test_a_weight_that_is_off_by_two_percent_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(losses, "HYBRID_VB_DIVISOR", 1.02 * losses.HYBRID_VB_DIVISOR)
    with pytest.raises(AssertionError, match="of train_adm"):
        check("train_adm", tmp_path, monkeypatch)
