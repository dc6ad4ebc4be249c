"""Optimizer steps whose loss or gradient is not finite: skipped on all processes, counted and named."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from faulty_runs import arguments_of, poisoned, train, without_update
from processes import run_distributed
from runs import bit_by_bit, read_metrics, reset_accelerate

from diffusers_adm.commands.errors import CommandError
from diffusers_adm.training.step_guard import StepGuard


POISONED = 5  # an example


def train_poisoned(arguments, epochs):
    with poisoned(lambda epoch, index: index == POISONED and epoch in epochs):
        return train(arguments)


def train_without(arguments, steps):
    with without_update(steps):
        return train(arguments)


def rows_without_faults(folder, steps):
    return [
        {k: v for k, v in row.items() if k != "skipped_steps"}
        for row in read_metrics(folder)
        if row["step"] not in steps
    ]


def state(folder):
    """The checkpoint of the last step, apart from its counters."""
    return Path(folder, "run", "checkpoint-5")


def assert_same_training(folder, other, steps):
    """Two runs, of which one had faults in `steps`, and the other no update there."""
    with bit_by_bit():
        assert rows_without_faults(folder / "run", steps) == rows_without_faults(other / "run", steps)
    for name in ("unet/diffusion_pytorch_model.safetensors", "model.safetensors"):
        assert (state(folder) / name).read_bytes() == (state(other) / name).read_bytes(), name


@pytest.mark.no_jitter("compares two runs bit by bit")
def test_one_image_of_nan(tmp_path, caplog):
    """Learning rate, average and optimizer are those of a run in which the step did nothing; the data go on."""
    changes = {"lr_scheduler": "cosine", "lr_warmup_steps": 0}
    assert train_poisoned(arguments_of(tmp_path / "poisoned", **changes), epochs=[0]) == 0
    [message] = [record.getMessage() for record in caplog.records if "is skipped" in record.getMessage()]
    steps = [int(message.split("step ")[1].split()[0])]
    assert f"The loss of step {steps[0]} is not finite; timesteps " in message
    assert len(message.split("examples ")[1].split(", ")) == 4
    assert "1 of 5 steps were skipped" in caplog.text
    assert train_without(arguments_of(tmp_path / "other", **changes), steps) == 0
    assert_same_training(tmp_path / "poisoned", tmp_path / "other", steps)
    rows = {row["step"]: row for row in read_metrics(tmp_path / "poisoned" / "run")}
    assert {step for step, row in rows.items() if "skipped_steps" in row} == {s for s in rows if s > steps[0]}
    assert all(row.get("skipped_steps", 1) == 1 for row in rows.values())


@pytest.mark.no_jitter("compares two runs bit by bit")
def test_one_of_two_processes(tmp_path):
    """The process with the NaN has it in one batch of two; the other one skips the step, too."""
    changes = {"train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert run_distributed(train_poisoned, arguments_of(tmp_path / "poisoned", **changes), [0]) == [0, 0]
    rows = read_metrics(tmp_path / "poisoned" / "run")
    steps = sorted({1, 2, 3, 4, 5} - {row["step"] for row in rows})
    assert len(steps) == 1
    assert rows[-1]["skipped_steps"] == 1
    assert run_distributed(train_without, arguments_of(tmp_path / "other", **changes), steps) == [0, 0]
    assert_same_training(tmp_path / "poisoned", tmp_path / "other", steps)


def test_too_many_in_a_row(tmp_path):
    """Names what there is to look at, and where to go on."""
    arguments = arguments_of(tmp_path, max_skipped_steps=2, checkpointing_steps=2, max_train_steps=9)
    with (
        poisoned(lambda epoch, index: epoch > 0),
        pytest.raises(
            CommandError, match=r"The loss of step 6 is not finite; timesteps (\d+, ){3}\d+, examples "
        ) as caught,
    ):
        train(arguments)
    assert caught.value.exit_code == 1
    assert "2 steps in a row were skipped" in str(caught.value)
    assert f"The last good checkpoint is {tmp_path / 'run' / 'checkpoint-4'}" in str(caught.value)
    assert train(arguments | {"resume_from_checkpoint": "latest"}) == 0  # the data are sound again
    assert read_metrics(tmp_path / "run")[-1]["step"] == 9


@pytest.fixture
def accelerator():
    reset_accelerate()
    yield Accelerator(cpu=True)
    reset_accelerate()


class TestStepGuard:
    def test_a_gradient_that_is_not_finite_although_the_loss_is(self, accelerator):
        guard = StepGuard(accelerator, "image {}".format)
        guard.record(torch.tensor(1.0), torch.tensor([3, 4]), {"index": torch.tensor([7, 8])})
        guard.agree(torch.tensor(float("inf")))
        assert guard.is_faulty
        assert guard.report(2) == "The gradient of step 2 is not finite; timesteps 3, 4, examples image 7, image 8"
        guard.begin()
        guard.record(torch.tensor(1.0), None, {})
        assert guard.agree(torch.tensor(1.0), [True, False]) == [True, False]
        assert not guard.is_faulty

    def test_only_the_faulty_batches_are_named(self, accelerator):
        guard = StepGuard(accelerator, str)
        for loss, index in ((1.0, 3), (float("nan"), 4)):
            guard.record(torch.tensor(loss), None, {"index": torch.tensor([index])})
        guard.agree(torch.tensor(float("nan")))
        assert guard.report(1) == "The loss of step 1 is not finite; examples 4"

    def test_an_overflow_under_the_scaler_is_no_fault(self, accelerator):
        """It has no norm here; a loss that is not finite is a fault there, too."""
        guard = StepGuard(accelerator, str)
        guard.record(torch.tensor(1.0), None, {})
        guard.agree(None)
        assert not guard.is_faulty
        guard.record(torch.tensor(float("inf")), None, {})
        guard.agree(None)
        assert guard.is_faulty

    def test_ten_in_a_row_by_default(self, accelerator):
        guard = StepGuard(accelerator, str)
        for _ in range(9):
            guard.count(1, "bad", None)
        guard.count(1, None, None)
        for _ in range(9):
            guard.count(1, "bad", None)
        with pytest.raises(CommandError, match="^bad. 10 steps in a row were skipped.*There is no checkpoint yet"):
            guard.count(1, "bad", None)


def test_fp16_overflow_and_a_loss_of_nan_under_a_real_scaler(accelerator):
    """torch's scaler works on the CPU, too: an overflow lowers its scale, a NaN of the loss does not."""
    from test_steps import Run

    run = Run(5, logging_steps=9, max_grad_norm=1e30)  # Accelerate would unscale gradients only on a GPU
    run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    run.optimizer = run.accelerator.prepare_optimizer(torch.optim.SGD([run.weight], lr=1.0))
    run.metrics.mark()
    scales, weights = [], []
    for factor in (1.0, torch.nan, 3e38, 1.0):  # 3e38 * 2**16 is infinite
        run._begin_step()
        run.accelerator.sync_gradients = True
        run.backward((run.weight * factor).sum())
        run.step_optimizer()
        run.after_step()
        scales.append(run.accelerator.scaler.get_scale())
        weights.append(float(run.weight.detach()))
    assert scales == [2.0**16, 2.0**16, 2.0**15, 2.0**15]
    assert weights == [-1.0, -1.0, -1.0, -2.0]
    assert run.progress.skipped_steps == 1
    assert run.lr_scheduler.get_last_lr() == [pytest.approx(0.8)]  # of the two steps that were taken
