"""Timestep samplers: unbiased whatever they learned, and one history over all processes, against lists and loops."""

import itertools
import math
from typing import get_args

import pytest
import torch
from processes import run_distributed
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_adm.training import (
    TIMESTEP_SAMPLERS,
    BiasedTimestepSampler,
    DiffusionArguments,
    LossSecondMomentTimestepSampler,
    TimestepSampler,
    UniformTimestepSampler,
)
from diffusers_adm.training.timestep_samplers import TimestepSamplerName


class BruteForce:
    """The history as lists: the newest `history` finite losses of each timestep, in the order in which they came."""

    def __init__(self, num_train_timesteps, history=10, uniform_prob=0.001):
        self.losses = [[] for _ in range(num_train_timesteps)]
        self.history, self.uniform_prob = history, uniform_prob

    def update(self, timesteps, losses):
        for t, loss in zip(timesteps.tolist(), losses.float().tolist(), strict=True):
            if math.isfinite(loss):
                self.losses[t] = (self.losses[t] + [loss])[-self.history :]

    def probabilities(self):
        total = len(self.losses)
        if any(len(losses) < self.history for losses in self.losses):
            return [1 / total] * total
        rms = [math.sqrt(sum(loss**2 for loss in losses) / self.history) for losses in self.losses]
        if sum(rms) == 0:
            return [1 / total] * total
        return [(1 - self.uniform_prob) * r / sum(rms) + self.uniform_prob / total for r in rms]


def probabilities(sampler):
    weights = sampler.weights()
    assert weights.dtype == torch.float64
    assert (weights > 0).all()
    return weights / weights.sum()


def warm_sampler(num_train_timesteps=20, seed=0, **kwargs):
    """Losses that fall by two orders of magnitude over the timesteps, as those of the bound do."""
    sampler = LossSecondMomentTimestepSampler(num_train_timesteps, **kwargs)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(sampler.history_per_term):
        noise = torch.rand(num_train_timesteps, generator=generator) + 0.5
        sampler.update(torch.arange(num_train_timesteps), torch.logspace(0, -2, num_train_timesteps) * noise)
    return sampler


class Handmade(TimestepSampler):
    """The base class with weights of its own, which need not sum to 1."""

    def weights(self):
        return torch.arange(1, self.num_train_timesteps + 1, dtype=torch.float64) ** 2


SAMPLERS = {
    "uniform": lambda: UniformTimestepSampler(20),
    "cold": lambda: LossSecondMomentTimestepSampler(20),
    "warm": warm_sampler,
    "handmade": lambda: Handmade(20),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# What every sampler keeps


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_weighted_loss_is_unbiased_exactly(make):
    """sum_t p_t w_t L_t is the mean of L for every L: one timestep at a time, w_t must be 1 / (T p_t)."""
    sampler = make()
    p = probabilities(sampler)
    timesteps, weights = sampler.sample(5000, generator=generator())
    assert set(timesteps.tolist()) >= set(p.topk(15).indices.tolist())
    assert weights.dtype == torch.float32
    assert_close(p[timesteps] * weights.double() * 20, torch.ones(5000, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_weighted_loss_is_unbiased_in_a_sample(make):
    sampler, number = make(), 200_000
    losses = torch.logspace(0, -2, 20, dtype=torch.float64) + 0.1
    timesteps, weights = sampler.sample(number, generator=generator())
    mean = (losses[timesteps] * weights.double()).mean()
    p = probabilities(sampler)
    variance = (p * (losses / (20 * p)) ** 2).sum() - losses.mean() ** 2
    assert (mean - losses.mean()).abs() <= 5 * (variance / number).sqrt()
    if sampler.weights().std() > 0:  # unweighted, it would be far off
        assert (losses[timesteps].mean() - losses.mean()).abs() > 20 * (variance / number).sqrt()


def test_sampling_by_the_loss_lowers_the_variance():
    """What the sampler is for (Improved DDPM, section 3.3)."""
    losses = torch.logspace(0, -2, 20)
    values = {}
    for name in ("uniform", "warm"):
        timesteps, weights = SAMPLERS[name]().sample(20_000, generator=generator())
        values[name] = (losses[timesteps] * weights).var()
    assert values["warm"] < 0.1 * values["uniform"]


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_timesteps_follow_the_probabilities(make):
    from scipy.stats import chisquare  # here, because the two processes below import this file, too

    sampler, number = make(), 100_000
    timesteps, _ = sampler.sample(number, generator=generator())
    assert timesteps.dtype == torch.int64
    counts = torch.bincount(timesteps, minlength=20)
    assert len(counts) == 20
    expected = number * probabilities(sampler)
    assert expected.min() > 5  # or chi-square would not hold
    assert chisquare(counts.numpy(), expected.numpy()).pvalue > 1e-4
    wrong = expected.roll(1)
    assert len(set(expected.tolist())) == 1 or chisquare(counts.numpy(), wrong.numpy()).pvalue < 1e-10


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_generator_decides_and_the_device_does_not(make):
    sampler = make()
    first, second = generator(1), generator(1)
    timesteps, weights = sampler.sample(64, generator=first)
    again, weights_again = sampler.sample(64, device="cpu", generator=second)
    assert torch.equal(timesteps, again)
    assert torch.equal(weights, weights_again)
    assert not torch.equal(sampler.sample(64, generator=first)[0], timesteps)
    # On another device the same numbers are drawn where the generator lives. ("meta" holds no values, but shows that.)
    third = generator(1)
    elsewhere, weights_elsewhere = sampler.sample(64, device="meta", generator=third)
    assert elsewhere.device.type == weights_elsewhere.device.type == "meta"
    assert torch.equal(third.get_state(), second.get_state())


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_without_a_generator_the_global_one_is_used(make):
    sampler = make()
    torch.manual_seed(3)
    first = sampler.sample(64)[0]
    torch.manual_seed(3)
    assert torch.equal(sampler.sample(64)[0], first)
    assert torch.equal(sampler.sample(64, generator=generator(3))[0], first)


@pytest.mark.parametrize("dtype, digits", [(torch.float64, 53), (torch.float32, 24)], ids=["float64", "float32"])
@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_the_ends_of_the_unit_interval(make, dtype, digits, monkeypatch):
    """0 and the largest number below 1 give the first and the last timestep, not one beyond; MPS draws in float32."""
    sampler = make()
    ends = torch.tensor([0.0, 1 - 2.0**-digits], dtype=dtype)
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: ends.clone())
    timesteps, weights = sampler.sample(2)
    assert timesteps.tolist() == [0, 19]
    assert weights.isfinite().all()


@pytest.mark.parametrize("make", [SAMPLERS["uniform"], SAMPLERS["cold"]], ids=["uniform", "cold"])
def test_a_timestep_owns_the_lower_end_of_its_interval(make, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: torch.tensor([0.5], dtype=torch.float64))
    assert make().sample(1)[0].tolist() == [10]


def test_one_timestep():
    for sampler in (UniformTimestepSampler(1), LossSecondMomentTimestepSampler(1, history_per_term=1)):
        sampler.update(torch.tensor([0]), torch.tensor([3.0]))
        timesteps, weights = sampler.sample(4)
        assert timesteps.tolist() == [0] * 4
        assert weights.tolist() == [1.0] * 4


def test_uniform_sampler_learns_nothing_and_has_no_state():
    sampler = UniformTimestepSampler(5)
    sampler.update(torch.arange(5), torch.arange(5.0))
    assert_close(probabilities(sampler), torch.full((5,), 0.2, dtype=torch.float64), rtol=1e-12, atol=0)
    assert_close(sampler.sample(10)[1], torch.ones(10))
    assert sampler.state_dict() == {}
    sampler.load_state_dict({})


# The history


def random_batches(num_train_timesteps, sizes, seed=0, odd=True):
    """Batches with many duplicates; some losses are not finite, some are 0."""
    source = generator(seed)
    for size in sizes:
        timesteps = torch.randint(0, num_train_timesteps, (size,), generator=source)
        losses = torch.rand(size, generator=source) + 0.1
        if odd:
            kind = torch.randint(0, 12, (size,), generator=source)
            for value, number in ((math.nan, 0), (math.inf, 1), (-math.inf, 2), (0.0, 3)):
                losses = torch.where(kind == number, torch.tensor(value), losses)
        yield timesteps, losses


@pytest.mark.parametrize("odd", [False, True], ids=["finite", "some-not-finite"])
@pytest.mark.parametrize("history", [1, 2, 3, 10])
@pytest.mark.parametrize("num_train_timesteps", [1, 4, 11])
def test_history_is_that_of_lists(num_train_timesteps, history, odd):
    """Batches from one example to far more of one timestep than its history holds."""
    sampler = LossSecondMomentTimestepSampler(num_train_timesteps, history, uniform_prob=0.01)
    expected = BruteForce(num_train_timesteps, history, uniform_prob=0.01)
    sizes = itertools.chain([1, 2, 5, 64, 3, 100], [7] * 10)
    for timesteps, losses in random_batches(num_train_timesteps, sizes, odd=odd):
        sampler.update(timesteps, losses)
        expected.update(timesteps, losses)
        for t, kept in enumerate(expected.losses):
            number = min(int(sampler.counts[t]), history)
            assert sorted(sampler.history[t, :number].tolist()) == sorted(kept)
        assert_close(probabilities(sampler).tolist(), expected.probabilities(), rtol=1e-12, atol=0)
    assert all(len(kept) == history for kept in expected.losses)  # the end was reached: fully warmed up
    assert num_train_timesteps == 1 or len(set(expected.probabilities())) > 1


def test_more_duplicates_than_the_history_keep_the_last_ones():
    sampler = LossSecondMomentTimestepSampler(2, history_per_term=3)
    sampler.update(torch.tensor([1] + [0] * 5), torch.tensor([9.0, 1.0, 2.0, 3.0, 4.0, 5.0]))
    assert sorted(sampler.history[0].tolist()) == [3.0, 4.0, 5.0]
    assert sampler.history[1].tolist() == [9.0, 0.0, 0.0]
    # The oldest of those is the next to go.
    sampler.update(torch.tensor([0]), torch.tensor([6.0]))
    assert sorted(sampler.history[0].tolist()) == [4.0, 5.0, 6.0]


def test_every_place_of_the_history_is_written_once():
    """Of two writes to one place either may win on a GPU."""
    places = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket == torch.ops.aten.index_put:
                places.extend(zip(*(index.tolist() for index in args[1]), strict=True))
            return func(*args, **(kwargs or {}))

    sampler = LossSecondMomentTimestepSampler(2, history_per_term=3)
    with Record():
        sampler.update(torch.tensor([1] + [0] * 5), torch.tensor([9.0, 1.0, 2.0, 3.0, 4.0, 5.0]))
    in_the_table = [place for place in places if place[0] < 2]
    assert len(in_the_table) == len(set(in_the_table)) == 4


def test_uniform_until_every_timestep_has_a_full_history():
    sampler = LossSecondMomentTimestepSampler(4, history_per_term=3)
    uniform = torch.full((4,), 0.25, dtype=torch.float64)
    updates = [torch.tensor([0, 1, 2, 3])] * 2 + [torch.tensor([0, 1, 2])] * 5
    for timesteps in updates:
        sampler.update(timesteps, 1.0 + timesteps.float())
        assert_close(probabilities(sampler), uniform, rtol=1e-12, atol=0)
        assert_close(sampler.sample(8)[1], torch.ones(8))
    sampler.update(torch.tensor([3]), torch.tensor([math.nan]))  # skipped: does not count as seen
    assert_close(probabilities(sampler), uniform, rtol=1e-12, atol=0)
    sampler.update(torch.tensor([3]), torch.tensor([4.0]))
    expected = 0.999 * torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64) / 10 + 0.001 / 4
    assert_close(probabilities(sampler), expected, rtol=1e-12, atol=0)


def test_second_moment_is_not_the_mean():
    """sqrt(E[L^2]): of losses 0 and 2 it is sqrt(2), of 1 and 1 it is 1."""
    sampler = LossSecondMomentTimestepSampler(2, history_per_term=2, uniform_prob=1e-9)
    sampler.update(torch.tensor([0, 0, 1, 1]), torch.tensor([0.0, 2.0, 1.0, 1.0]))
    p = probabilities(sampler)
    assert p[0] / p[1] == pytest.approx(2**0.5, rel=1e-6)


@pytest.mark.parametrize("uniform_prob", [0.001, 0.2, 1.0])
def test_every_timestep_keeps_its_share_of_the_uniform_distribution(uniform_prob):
    sampler = LossSecondMomentTimestepSampler(4, history_per_term=2, uniform_prob=uniform_prob)
    sampler.update(torch.arange(4).repeat(2), torch.tensor([0.0, 0.0, 1e-12, 5.0]).repeat(2))
    p = probabilities(sampler)
    assert p[0].item() == pytest.approx(uniform_prob / 4, rel=1e-12)
    assert (p >= uniform_prob / 4 * (1 - 1e-12)).all()
    if uniform_prob == 1.0:
        assert_close(p, torch.full((4,), 0.25, dtype=torch.float64), rtol=1e-12, atol=0)
    else:
        timesteps, weights = sampler.sample(400_000, generator=generator())
        assert (timesteps == 0).any()
        assert_close(weights[timesteps == 0][0].item(), 1 / uniform_prob, rtol=1e-5, atol=0)


def test_losses_of_zero_everywhere_are_uniform():
    sampler = LossSecondMomentTimestepSampler(3, history_per_term=2)
    sampler.update(torch.arange(3).repeat(2), torch.zeros(6))
    assert_close(probabilities(sampler), torch.full((3,), 1 / 3, dtype=torch.float64), rtol=1e-12, atol=0)
    assert sampler.sample(8)[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_losses_of_any_dtype_with_a_graph(dtype):
    sampler = LossSecondMomentTimestepSampler(2, history_per_term=1)
    losses = torch.tensor([0.5, 2.0], dtype=dtype, requires_grad=True)
    sampler.update(torch.tensor([0, 1]), losses * 1)
    assert sampler.history[:, 0].tolist() == [0.5, 2.0]
    assert not sampler.history.requires_grad
    assert not sampler.sample(4)[1].requires_grad


# State


def test_state_round_trip():
    saved, resumed = warm_sampler(seed=1), LossSecondMomentTimestepSampler(20)
    state = saved.state_dict()
    resumed.load_state_dict(state)
    batches = list(random_batches(20, [30] * 5, seed=2))
    for timesteps, losses in batches:
        assert_close(resumed.weights(), saved.weights(), rtol=1e-12, atol=0)
        assert torch.equal(resumed.sample(50, generator=generator())[0], saved.sample(50, generator=generator())[0])
        saved.update(timesteps, losses)
        resumed.update(timesteps, losses)
    # The saved state is a copy: what came later did not reach it.
    assert torch.equal(state["history"], warm_sampler(seed=1).history)
    assert torch.equal(state["counts"], warm_sampler(seed=1).counts)
    assert not torch.equal(saved.history, state["history"])


@pytest.mark.parametrize(
    "state, message",
    [
        (LossSecondMomentTimestepSampler(30).state_dict(), r"shape \(30, 10\); this sampler's is \(20, 10\)"),
        (LossSecondMomentTimestepSampler(20, 5).state_dict(), r"shape \(20, 5\); this sampler's is \(20, 10\)"),
        (UniformTimestepSampler(20).state_dict(), r"shape \(0,\); this sampler's is \(20, 10\)"),
    ],
    ids=["timesteps", "history", "uniform"],
)
def test_state_of_another_sampler_is_refused(state, message):
    sampler = warm_sampler()
    before = sampler.weights()
    with pytest.raises(ValueError, match=message):
        sampler.load_state_dict(state)
    assert_close(sampler.weights(), before, rtol=1e-12, atol=0)


# Bad input


def test_names_are_those_of_the_arguments():
    assert list(TIMESTEP_SAMPLERS) == list(get_args(TimestepSamplerName))


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"history_per_term": 0}, "`history_per_term` is 0; it must be positive"),
        ({"uniform_prob": 0.0}, r"`uniform_prob` is 0.0; it must lie in \(0, 1\]"),
        ({"uniform_prob": 1.5}, "`uniform_prob` is 1.5"),
        ({"uniform_prob": -0.1}, "`uniform_prob` is -0.1"),
    ],
)
def test_bad_arguments_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LossSecondMomentTimestepSampler(**{"num_train_timesteps": 10, **kwargs})


@pytest.mark.parametrize("losses", [torch.ones(2), torch.tensor(1.0), torch.ones(3, 1)], ids=["2", "mean", "3x1"])
def test_update_wants_one_loss_per_example(losses):
    with pytest.raises(ValueError, match=r"`timesteps` has shape \(3,\) and `losses` .* one loss per example"):
        LossSecondMomentTimestepSampler(10).update(torch.arange(3), losses)


# Devices and processes


class NoHostReads(TorchDispatchMode):
    """Fails at what makes the host wait for a device: `.item()`, `bool(tensor)`, `nonzero`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        forbidden = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.is_nonzero)
        assert func.overloadpacket not in forbidden, f"{func} reads a tensor on the host"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_a_process_alone_never_waits_for_the_device(make):
    sampler = make()
    timesteps, losses = next(random_batches(20, [50]))
    with NoHostReads():
        sampler.update(timesteps, losses)
        sampler.sample(16, generator=generator())
    # "meta" holds no values, so nothing can be read from it or copied to the host.
    if isinstance(sampler, LossSecondMomentTimestepSampler):
        sampler.update(timesteps.to("meta"), losses.to("meta"))
        assert sampler.history.device.type == "meta"
        assert sampler.sample(16, device="meta")[0].shape == (16,)


def test_known_wrong_a_host_read_is_seen():
    with NoHostReads(), pytest.raises(AssertionError, match="reads a tensor on the host"):
        torch.ones(2).sum().item()


SIZES = ([4, 30, 1, 16, 0, 40, 12], [9, 2, 25, 16, 8, 0, 40])  # of the batches of each rank


def update_on_rank():
    from accelerate import Accelerator

    rank = Accelerator(cpu=True).process_index
    sampler = LossSecondMomentTimestepSampler(6, history_per_term=3, uniform_prob=0.01)
    weights = []
    for timesteps, losses in random_batches(6, SIZES[rank], seed=rank):
        sampler.update(timesteps, losses)
        weights.append(sampler.weights().tolist())
    # Ranks draw for themselves, from the same distribution.
    return weights, sampler.state_dict()["history"].tolist(), sampler.sample(8, generator=generator(rank))[0].tolist()


def test_two_processes_with_batches_of_different_size_share_one_history():
    first, second = run_distributed(update_on_rank)
    assert first[:2] == second[:2]
    assert first[2] != second[2]
    expected = BruteForce(6, 3, uniform_prob=0.01)
    ranks = zip(random_batches(6, SIZES[0], seed=0), random_batches(6, SIZES[1], seed=1), strict=True)
    for (batch_0, batch_1), weights in zip(ranks, first[0], strict=True):
        expected.update(torch.cat([batch_0[0], batch_1[0]]), torch.cat([batch_0[1], batch_1[1]]))
        p = torch.tensor(weights, dtype=torch.float64)
        assert_close((p / p.sum()).tolist(), expected.probabilities(), rtol=1e-12, atol=0)
    assert len(set(expected.probabilities())) == 6  # warmed up
    # The order of the ranks shows: the other way round would have kept other losses.
    assert [sorted(row) for row in first[1]] == [sorted(kept) for kept in expected.losses]
    reverse = BruteForce(6, 3, uniform_prob=0.01)
    for batch_0, batch_1 in zip(random_batches(6, SIZES[0], seed=0), random_batches(6, SIZES[1], seed=1), strict=True):
        reverse.update(torch.cat([batch_1[0], batch_0[0]]), torch.cat([batch_1[1], batch_0[1]]))
    assert reverse.losses != expected.losses


# Biased timesteps


@pytest.mark.parametrize(
    ("strategy", "given", "biased"),
    [
        ("earlier", {"portion": 0.2}, range(0, 4)),
        ("later", {}, range(15, 20)),
        ("later", {"portion": 1.0}, range(0, 20)),
        ("range", {"begin": 3, "end": 9}, range(3, 9)),
        ("range", {"begin": 12}, range(12, 20)),
        ("range", {}, range(0, 20)),
    ],
)
def test_biased_timesteps_are_drawn_more_often(strategy, given, biased):
    sampler = BiasedTimestepSampler.from_strategy(20, strategy, 3.0, **given)
    timesteps, weights = sampler.sample(40_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(weights, torch.ones(40_000))  # no weights undo the bias
    shares = torch.tensor([3.0 if number in biased else 1.0 for number in range(20)])
    expected = 40_000 * shares / shares.sum()
    counts = torch.bincount(timesteps, minlength=20)
    # The sum of squares over 19 degrees of freedom: 43.8 is exceeded with a probability of 0.001.
    assert ((counts - expected) ** 2 / expected).sum() < 43.8


def test_the_loss_of_biased_timesteps_counts_more():
    """The expectation of the weighted loss is the mean in which they count `multiplier` times."""
    sampler = BiasedTimestepSampler(10, 8, 10, 4.0)
    losses = torch.arange(10.0)
    timesteps, weights = sampler.sample(100_000, generator=torch.Generator().manual_seed(1))
    expected = (losses[:8].sum() + 4 * losses[8:].sum()) / (8 + 4 * 2)
    assert (weights * losses[timesteps]).mean().item() == pytest.approx(expected.item(), rel=0.01)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((10, 5, 5, 2.0), r"are \[5, 5\); they must lie in \[0, 10\)"),
        ((10, -1, 5, 2.0), r"are \[-1, 5\)"),
        ((10, 5, 11, 2.0), r"are \[5, 11\)"),
        ((10, 5, 10, 0.0), "`multiplier` is 0.0; it must be a positive number"),
        ((10, 5, 10, float("inf")), "`multiplier` is inf"),
    ],
)
def test_wrong_biases(arguments, message):
    with pytest.raises(ValueError, match=message):
        BiasedTimestepSampler(*arguments)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"multiplier": 2.0}, "`timestep_bias_multiplier` was given, but `timestep_bias_strategy` is 'none'"),
        ({"strategy": "later"}, "`timestep_bias_multiplier` was not given"),
        ({"strategy": "later", "multiplier": 2.0, "begin": 0}, "`timestep_bias_begin` was given, but .* is 'later'"),
        ({"strategy": "range", "multiplier": 2.0, "portion": 0.5}, "`timestep_bias_portion` was given"),
        ({"strategy": "later", "multiplier": -2.0}, "`timestep_bias_multiplier` is -2.0; it must be positive"),
        ({"strategy": "later", "multiplier": 2.0, "portion": 1.5}, r"is 1.5; it must lie in \(0, 1\]"),
    ],
)
def test_wrong_arguments_of_biases(given, message):
    with pytest.raises(ValueError, match=message):
        DiffusionArguments(**{f"timestep_bias_{name}": value for name, value in given.items()})


def test_a_bias_and_weights_exclude_each_other():
    bias = {"timestep_bias_strategy": "later", "timestep_bias_multiplier": 2.0}
    with pytest.raises(ValueError, match="whose weights would undo `timestep_bias_strategy`"):
        DiffusionArguments(timestep_sampler="loss-second-moment", **bias)


def test_samplers_by_arguments():
    for strategy in (None, "none"):
        arguments = DiffusionArguments(timestep_bias_strategy=strategy)
        assert type(arguments.build_timestep_sampler(10)) is UniformTimestepSampler
    given = {"timestep_bias_multiplier": 2.0, "timestep_bias_begin": 4, "timestep_bias_end": 6}
    biased = DiffusionArguments(timestep_bias_strategy="range", **given)
    assert biased.build_timestep_sampler(10).weights().tolist() == [1, 1, 1, 1, 2, 2, 1, 1, 1, 1]
    given = {"timestep_bias_multiplier": 2.0, "timestep_bias_portion": 0.1}
    with pytest.raises(ValueError, match="is 'later': `portion` is 0.1, which is less than one of 5 timesteps"):
        DiffusionArguments(timestep_bias_strategy="later", **given).build_timestep_sampler(5)
    with pytest.raises(ValueError, match=r"`timestep_bias_strategy` is 'range': .* are \[4, 6\)"):
        biased.build_timestep_sampler(5)
