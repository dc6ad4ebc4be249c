"""Training curves: means against NumPy in float64, over real processes, and files that survive a resume."""

import json
import math

import matplotlib
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from processes import run_distributed

from diffusers_adm.training.metrics import LossMetrics, MetricsHistory
from diffusers_adm.training.plots import plot_loss_curves, smooth


def batches(num_batches=5, num_train_timesteps=1000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for size in range(3, 3 + num_batches):
        timesteps = torch.randint(0, num_train_timesteps, (size,), generator=generator)
        yield timesteps, *(torch.rand(size, generator=generator) for _ in range(4))


def expected_means(batches, num_train_timesteps=1000, weighted=False):
    columns = [np.concatenate(column).astype(np.float64) for column in zip(*batches, strict=True)]
    timesteps, loss, mse, vb, weights = columns
    weights = weights if weighted else np.ones_like(weights)
    means = {name: np.average(x, weights=weights) for name, x in (("loss", loss), ("mse", mse), ("vb", vb))}
    for quarter in range(4):
        chosen = (timesteps >= num_train_timesteps * quarter / 4) & (
            timesteps < num_train_timesteps * (quarter + 1) / 4
        )
        if chosen.any():
            means[f"loss_q{quarter}"] = np.average(loss[chosen], weights=weights[chosen])
    return means


@pytest.mark.parametrize("num_train_timesteps", [1000, 10, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_means(num_train_timesteps, weighted):
    metrics = LossMetrics(num_train_timesteps)
    data = list(batches(num_train_timesteps=num_train_timesteps))
    for timesteps, loss, mse, vb, weights in data:
        metrics.update(timesteps, loss, mse, vb, weights=weights if weighted else None)
    means, expected = metrics.compute(Accelerator(cpu=True)), expected_means(data, num_train_timesteps, weighted)
    assert means == pytest.approx(expected, rel=1e-6)  # sums of float32


def test_importance_weights_give_the_means_of_uniform_timesteps():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.linspace(1, 5, 100)
    timesteps = torch.multinomial(probabilities, 200_000, replacement=True, generator=generator)
    loss = timesteps.float() ** 2  # known at each timestep, so the uniform mean is known
    metrics = LossMetrics(100)
    metrics.update(timesteps, loss, weights=probabilities.mean() / probabilities[timesteps])
    means = metrics.compute(Accelerator(cpu=True))
    squares = np.arange(100.0) ** 2
    assert means["loss"] == pytest.approx(squares.mean(), rel=0.01)
    assert means["loss_q3"] == pytest.approx(squares[75:].mean(), rel=0.01)
    assert loss.mean() > 1.2 * squares.mean()  # unweighted, it would be far off


def test_what_was_not_seen_is_absent_and_reset_forgets():
    metrics, accelerator = LossMetrics(8), Accelerator(cpu=True)
    assert metrics.compute(accelerator) == {}
    metrics.update(torch.tensor([0, 1, 7]), torch.tensor([1.0, 2.0, 9.0]))
    assert metrics.compute(accelerator) == pytest.approx({"loss": 4.0, "loss_q0": 1.5, "loss_q3": 9.0})
    metrics.reset()
    assert metrics.compute(accelerator) == {}


def test_a_loss_that_is_nan_stays_in_its_quarter():
    metrics = LossMetrics(8)
    metrics.update(torch.tensor([0, 7]), torch.tensor([math.nan, 3.0]))
    means = metrics.compute(Accelerator(cpu=True))
    assert math.isnan(means["loss"])
    assert math.isnan(means["loss_q0"])
    assert means["loss_q3"] == pytest.approx(3.0)


def test_losses_of_lower_precision_and_with_gradients():
    metrics = LossMetrics(8)
    loss = torch.ones(2, dtype=torch.bfloat16, requires_grad=True) * 2
    for _ in range(300):  # in bfloat16 a sum of ones stops growing at 256
        metrics.update(torch.tensor([0, 7]), loss)
    assert metrics.compute(Accelerator(cpu=True))["loss"] == 2.0
    assert not metrics.sums.requires_grad


def compute_on_rank():
    accelerator = Accelerator(cpu=True)
    metrics = LossMetrics(1000, accelerator.device)
    # Rank 1 has other examples, more of them, and no bound term.
    for timesteps, loss, mse, vb, _ in batches(2 + 3 * accelerator.process_index, seed=accelerator.process_index):
        metrics.update(timesteps, loss, mse, vb if accelerator.process_index == 0 else None)
    return metrics.compute(accelerator), metrics.compute(accelerator)


def test_two_processes_count_every_example_once():
    results = run_distributed(compute_on_rank)
    first, second = list(batches(2, seed=0)), list(batches(5, seed=1))
    expected = {**expected_means(first + second), "vb": expected_means(first)["vb"]}
    for once, twice in results:
        assert once == pytest.approx(expected, rel=1e-6)
        assert twice == once  # computing does not change the sums


class TestHistory:
    def test_rows_come_back_and_the_file_is_strict_json(self, tmp_path):
        history = MetricsHistory(tmp_path / "out" / "metrics.jsonl")
        assert history.rows() == []
        history.append(10, {"loss": 0.5, "vb": math.inf})
        history.append(20, {"loss": 0.25})
        rows = MetricsHistory(tmp_path / "out" / "metrics.jsonl").rows()
        assert rows[1] == {"step": 20, "loss": 0.25}
        assert math.isnan(rows[0]["vb"])
        lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[0], parse_constant=pytest.fail) == {"step": 10, "loss": 0.5, "vb": None}

    def test_rewind_drops_what_a_resumed_run_writes_again(self, tmp_path):
        history = MetricsHistory(tmp_path / "metrics.jsonl")
        history.rewind(0)
        for step in (10, 20, 30):
            history.append(step, {"loss": float(step)})
        history.rewind(20)
        history.append(30, {"loss": -1.0})
        assert [(row["step"], row["loss"]) for row in history.rows()] == [(10, 10.0), (20, 20.0), (30, -1.0)]
        history.rewind(0)
        assert history.rows() == []
        assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]

    def test_a_row_cut_short_by_a_kill(self, tmp_path, caplog):
        history = MetricsHistory(tmp_path / "metrics.jsonl")
        history.append(10, {"loss": 1.0})
        with open(history.path, "a") as file:
            file.write('{"step": 20, "lo')
        assert history.rows() == [{"step": 10, "loss": 1.0}]
        assert "line 2 is not a row" in caplog.text
        history.rewind(20)
        history.append(20, {"loss": 2.0})
        assert [row["step"] for row in history.rows()] == [10, 20]


@pytest.mark.draws
class TestPlot:
    def rows(self, count):
        generator = np.random.default_rng(0)
        names = ("loss", "mse", "vb", "loss_q0", "loss_q1", "loss_q2", "loss_q3")
        for index in range(count):
            yield {"step": 10 * index} | {name: float(generator.lognormal(-index / 50)) for name in names}

    @pytest.mark.parametrize("count", [1, 100])
    def test_both_panels_hold_lines_of_every_metric(self, tmp_path, count):
        path = plot_loss_curves(list(self.rows(count)), tmp_path / "curves.png")
        assert path == str(tmp_path / "curves.png")
        pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
        # matplotlib's first colours (blue, orange, green, red), three of them on the left and four on the right.
        colors = [(31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40)]
        left, right = np.split(pixels, 2, axis=1)
        for half, expected in ((left, colors[:3]), (right, colors)):
            for color in expected:
                assert (np.abs(half - color).max(axis=-1) < 10).sum() > 20

    def test_gaps_zeros_and_missing_metrics(self, tmp_path):
        rows = [{"step": 1, "loss": 0.0}, {"step": 2, "loss": math.nan}, {"step": 3, "loss_q1": 1.0}]
        plot_loss_curves(rows, tmp_path / "curves.png")
        plot_loss_curves(rows[:1], tmp_path / "curves.png")

    def test_matplotlib_is_left_as_it_was(self, tmp_path):
        before = dict(matplotlib.rcParams)
        plot_loss_curves(list(self.rows(3)), tmp_path / "curves.png")
        assert dict(matplotlib.rcParams) == before

    def test_smoothing(self):
        assert smooth([3.0, 1.0, 2.0], span=1) == [3.0, 1.0, 2.0]
        assert smooth([5.0] * 10, span=4) == pytest.approx([5.0] * 10)
        assert smooth([1.0, 3.0], span=2) == pytest.approx([1.0, (0.5 * 1 + 3) / 1.5])
        assert smooth([math.nan, 2.0, math.nan], span=3)[1:] == [2.0, 2.0]
