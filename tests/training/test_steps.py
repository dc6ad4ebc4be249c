"""The end of a step: learning rate, average, row of the log; and when checkpoints and validations are due."""

import logging

import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from runs import reset_accelerate

from diffusers_adm.training import (
    LossMetrics,
    TrainingArguments,
    TrainingLosses,
    TrainingProgress,
    TrainingRun,
    UniformTimestepSampler,
    record_losses,
)
from diffusers_adm.training.batch_split import BatchSplitter
from diffusers_adm.training.interruption import Interruption
from diffusers_adm.training.log import DivergenceWatch
from diffusers_adm.training.power_ema import PowerEMA
from diffusers_adm.training.step_guard import StepGuard


class Log:
    """Rows as `TrainingLog.write` gets them."""

    def __init__(self):
        self.steps, self.rows = 0, []

    def advance(self):
        self.steps += 1

    def write(self, step, values, learning_rate):
        self.rows.append((step, values["loss"], learning_rate))


class Run(TrainingRun):
    """One weight of 0, to which each step adds 1; the learning rate falls from 1 by a tenth a step."""

    def __init__(self, max_train_steps, **arguments):
        self.max_train_steps, self.training_args = max_train_steps, TrainingArguments(**arguments)
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.parameters = [self.weight]
        self.optimizer = torch.optim.SGD([self.weight], lr=1.0)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 - step / 10)
        self.ema = EMAModel([self.weight], decay=0.5)
        self.power_ema = self.opponent = self.opponent_optimizer = None
        self.progress, self.metrics, self.log = TrainingProgress(), LossMetrics(100), Log()
        reset_accelerate()
        self.accelerator = Accelerator(cpu=True)
        self.guard, self.interruption = StepGuard(self.accelerator, str), Interruption()
        self.logger = logging.getLogger(__name__)
        self.splitter, self.step_was_taken = BatchSplitter(), True

    def step(self):
        with torch.no_grad():
            self.weight += 1
        self.optimizer.step()  # without gradients it does nothing, but the scheduler warns if it is left out
        self.metrics.update(torch.tensor([3]), torch.tensor([float(self.progress.global_step)]))
        return self.after_step()


def test_a_checkpoint_waits_for_a_step_that_is_taken():
    """Finite weights may have diverged, and would replace a sound checkpoint."""
    run = Run(9, logging_steps=9, checkpointing_steps=2)
    run.metrics.mark()
    dues = []
    for is_faulty in (False, True, False, False, False, False, False, False, True):
        run.guard.is_faulty = is_faulty
        dues.append(run.step().checkpoint)
    assert [step for step, due in enumerate(dues, start=1) if due] == [3, 4, 6, 8, 9]  # the last one has to be
    assert run.progress.skipped_steps == 2


def test_averages_over_steps_have_a_weight_for_a_skipped_one():
    """That of the weights after it, as the profile that averages are reconstructed from has it."""
    run = Run(9, logging_steps=9, checkpointing_steps=9)
    network = torch.nn.Module()
    network.weight = run.weight
    run.power_ema = PowerEMA({"": network}, [0.15])
    for run.step_was_taken in (True, False, True):
        if run.step_was_taken:
            run.step()
        else:
            run.after_step()
    exponent = run.power_ema.gammas[0] + 1
    expected = (1 * 1 + 1 * (2**exponent - 1) + 2 * (3**exponent - 2**exponent)) / 3**exponent
    assert float(run.power_ema.averages[0][0]) == pytest.approx(expected, rel=1e-6)


def test_what_is_due_when():
    run = Run(7, logging_steps=2, checkpointing_steps=3, validation_steps=5)
    dues = {step: run.step() for step in range(1, 8)}
    assert run.progress == TrainingProgress(global_step=7)
    assert run.log.steps == 7
    assert [step for step, due in dues.items() if due.checkpoint] == [3, 6, 7]
    assert [step for step, due in dues.items() if due.validation] == [5]
    # Losses 0, 1, ... 6; a row has the mean of those since the row before, and ends with a checkpoint.
    assert run.log.rows == [
        (step, mean, 1 - step / 10) for step, mean in ((2, 0.5), (3, 2.0), (4, 3.0), (6, 4.5), (7, 6.0))
    ]


def test_the_average_and_validation_at_the_end_alone():
    run = Run(3)
    assert not any(run.step().validation for _ in range(3))
    # Decays of 0, 2/11 and 3/12 for weights of 1, 2 and 3, by diffusers' warm-up.
    assert float(run.ema.shadow_params[0]) == pytest.approx((1 * 2 / 11 + 2 * 9 / 11) / 4 + 3 * 3 / 4)


def test_a_step_that_the_gradient_scaler_skipped(monkeypatch):
    """The learning rate waits; the step counts all the same."""
    run = Run(3)
    monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", True)
    run.step()
    assert run.lr_scheduler.get_last_lr() == [1.0]
    assert run.progress.global_step == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_reach_no_checkpoint(value):
    """Also where the loss that led to them was finite. Without a checkpoint nothing looks at them."""
    run = Run(7, logging_steps=1, checkpointing_steps=2)
    run.step()
    run.step()
    with torch.no_grad():
        run.weight.fill_(value)
    run.step()
    with pytest.raises(RuntimeError, match="The weights are not finite at step 4, so no checkpoint.*`--learning_rate`"):
        run.step()
    with torch.no_grad():
        run.weight.fill_(1.0)
    run.ema.shadow_params[0].fill_(value)
    run.progress.global_step = 5
    with pytest.raises(RuntimeError, match="The averaged weights are not finite at step 6"):
        run.step()


class TestDivergenceWatch:
    def test_ordinary_curves_and_rows_of_few_images(self):
        watch, generator = DivergenceWatch(), torch.Generator().manual_seed(0)
        for step in range(500):
            # Falls by 50; log-normal rows, by e up or down.
            value = (0.02 + 1 / (1 + step)) * float(torch.randn((), generator=generator).exp())
            assert watch.update({"loss": 2 * value, "mse": value}) is None

    def test_absurd_at_once(self):
        assert "its mse is 5e+21" in DivergenceWatch().update({"loss": 5e21, "mse": 5e21})
        assert "its loss is 101" in DivergenceWatch().update({"loss": 101.0})  # a classifier's

    def test_what_had_been_learned_is_lost(self):
        watch = DivergenceWatch()
        for _ in range(30):
            assert watch.update({"loss": 1.0, "mse": 0.005}) is None
        assert "its mse is 0.9, and had fallen to 0.005" in watch.update({"loss": 1.0, "mse": 0.9})
        assert watch.update({"loss": 1.0, "mse": 0.006}) is None  # it has recovered

    def test_a_classifier_that_knows_its_images_by_heart(self):
        """Its cross entropy is nearly 0, and one uncertain image is a thousand times as much."""
        watch = DivergenceWatch()
        for _ in range(30):
            assert watch.update({"loss": 2e-5}) is None
        assert watch.update({"loss": 0.05}) is None
        assert "its loss is 3" in watch.update({"loss": 3.0})


def test_losses_as_they_are():
    """Whatever the weights: the sampler sees none, and the simple objective has no bound term."""
    terms = TrainingLosses(*(torch.tensor([1.0, 3.0], requires_grad=True) * factor for factor in (1, 0.75, 0.25)))
    timesteps, weights = torch.tensor([10, 90]), torch.tensor([1.0, 3.0])

    class Sampler(UniformTimestepSampler):
        def update(self, timesteps, losses):
            self.seen = timesteps, losses

    accelerator = Accelerator(cpu=True)
    for objective, names in (("simple", {"loss", "mse"}), ("hybrid", {"loss", "mse", "vb"})):
        sampler, metrics = Sampler(100), LossMetrics(100)
        record_losses(terms, timesteps, weights, objective, sampler, metrics)
        assert torch.equal(sampler.seen[0], timesteps)
        assert torch.equal(sampler.seen[1], torch.tensor([1.0, 3.0]))
        assert not sampler.seen[1].requires_grad
        values = metrics.compute(accelerator)
        assert {name for name in values if not name.startswith("loss_q")} == names
        assert values["loss"] == pytest.approx(2.5)  # (1 x 1 + 3 x 3) / 4
