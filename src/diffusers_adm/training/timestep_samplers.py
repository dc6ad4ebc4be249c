"""
Timestep samplers: which timesteps to train on, and the weights that keep the loss unbiased.

Nichol & Dhariwal 2021 (https://huggingface.co/papers/2102.09672), section 3.3 and eq. 18: timesteps drawn in proportion
to the root mean square of their recent losses, which reduces the variance of L_vlb's gradient.

`BiasedTimestepSampler` changes the loss instead: some timesteps count more, as in diffusers' SDXL training script.

To add a timestep sampler, write a subclass of `TimestepSampler` and extend `TimestepSamplerName` and
`TIMESTEP_SAMPLERS`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from accelerate import PartialState
from accelerate.utils import gather, pad_across_processes


def _uniform(batch_size: int, device: str | torch.device | None, generator: torch.Generator | None) -> torch.Tensor:
    """Numbers in [0, 1), on the device of the generator, in float64 if the devices have it."""
    source = generator.device if generator is not None else torch.device(device or "cpu")
    dtype = torch.float32 if "mps" in (source.type, torch.device(device or "cpu").type) else torch.float64
    return torch.rand(batch_size, generator=generator, device=source, dtype=dtype)


class TimestepSampler:
    """
    Base class: draws timesteps with probability p_t = w_t / sum(w) and gives each the weight 1 / (T p_t), so that the
    expectation of `weight * loss(t)` is the mean of the loss over uniform timesteps for all w.
    """

    def __init__(self, num_train_timesteps: int):
        self.num_train_timesteps = num_train_timesteps

    def weights(self) -> torch.Tensor:
        """The w_t: `(num_train_timesteps,)`, float64, positive; need not sum to 1."""
        raise NotImplementedError

    def sample(
        self,
        batch_size: int,
        device: str | torch.device | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        r"""
        Draws timesteps.

        Args:
            batch_size (`int`): Number of timesteps.
            device (`torch.device`, *optional*): Device of the results.
            generator (`torch.Generator`, *optional*): On any device; the timesteps do not depend on `device`. `None`:
                the global one of `device`.

        Returns:
            `tuple` of `torch.Tensor`: Timesteps in `[0, num_train_timesteps)` (int64), and the weights by which to
            multiply their losses (float32); both `(batch_size,)`.
        """
        cumulative = self.weights().cumsum(0)
        cumulative = cumulative / cumulative[-1]
        # Inverts the distribution function at uniform numbers; `torch.multinomial` needs a generator on the device.
        uniform = _uniform(batch_size, cumulative.device if device is None else device, generator)
        uniform = uniform.to(cumulative.device).to(cumulative.dtype)
        timesteps = torch.searchsorted(cumulative, uniform, right=True)
        timesteps = timesteps.clamp(max=self.num_train_timesteps - 1)
        probabilities = torch.diff(cumulative, prepend=cumulative.new_zeros(1))[timesteps]
        weights = (1 / (self.num_train_timesteps * probabilities)).float()
        return timesteps.to(device), weights.to(device)

    def update(self, timesteps: torch.Tensor, losses: torch.Tensor) -> None:
        """Learns from the *unweighted* losses `(batch_size,)` at `timesteps`. Every process must call it."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        pass


class UniformTimestepSampler(TimestepSampler):
    """Draws every timestep with the same probability; all weights are 1."""

    def weights(self) -> torch.Tensor:
        return torch.ones(self.num_train_timesteps, dtype=torch.float64)

    def sample(
        self,
        batch_size: int,
        device: str | torch.device | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same as in the base class, without its table."""
        timesteps = (_uniform(batch_size, device, generator) * self.num_train_timesteps).long().to(device)
        return timesteps.clamp(max=self.num_train_timesteps - 1), torch.ones(batch_size, device=timesteps.device)


class LossSecondMomentTimestepSampler(TimestepSampler):
    r"""
    Draws timesteps with p_t proportional to sqrt(E[L_t^2]) over the last `history_per_term` losses at t, mixed with a
    small share of the uniform distribution; uniform until every timestep has a full history.

    Args:
        num_train_timesteps (`int`): Number T of training timesteps.
        history_per_term (`int`, defaults to 10): Losses remembered per timestep.
        uniform_prob (`float`, defaults to 0.001): Share of the uniform distribution, so that every timestep can occur.
    """

    def __init__(self, num_train_timesteps: int, history_per_term: int = 10, uniform_prob: float = 0.001):
        super().__init__(num_train_timesteps)
        if history_per_term < 1:
            raise ValueError(f"`history_per_term` is {history_per_term}; it must be positive.")
        if not 0 < uniform_prob <= 1:  # at 0, a timestep whose losses were 0 would never occur again
            raise ValueError(f"`uniform_prob` is {uniform_prob}; it must lie in (0, 1].")
        self.history_per_term = history_per_term
        self.uniform_prob = uniform_prob
        # Entry `counts[t] % history_per_term` of row t is the next to be overwritten.
        self.history = torch.zeros(num_train_timesteps, history_per_term, dtype=torch.float64)
        self.counts = torch.zeros(num_train_timesteps, dtype=torch.long)

    def weights(self) -> torch.Tensor:
        root_mean_square = self.history.square().mean(dim=1).sqrt()
        total = root_mean_square.sum()
        weights = (1 - self.uniform_prob) * root_mean_square / total + self.uniform_prob / self.num_train_timesteps
        # Chosen on the device, because reading whether the history is full would wait for it.
        usable = (self.counts >= self.history_per_term).all() & (total > 0)
        return torch.where(usable, weights, torch.ones_like(weights))

    def update(self, timesteps: torch.Tensor, losses: torch.Tensor) -> None:
        r"""
        Remembers the losses of all processes, in the order of their ranks, so that every process draws from the same
        distribution. This is a collective call: every process must make it, with a batch of any size.

        Args:
            timesteps (`torch.LongTensor` of shape `(batch_size,)`): Those of [`~TimestepSampler.sample`].
            losses (`torch.Tensor` of shape `(batch_size,)`): Unweighted, or the sampler would learn from its own
                weights.
        """
        if timesteps.shape != losses.shape or timesteps.ndim != 1:
            shapes = f"`timesteps` has shape {tuple(timesteps.shape)} and `losses` {tuple(losses.shape)}"
            raise ValueError(f"{shapes}; both must be (batch_size,): one loss per example.")
        timesteps, losses = timesteps.detach(), losses.detach().float()
        # Padding compares sizes on the host even for a single process, which should not wait for that.
        if PartialState().num_processes > 1:
            # One collective for both: float32 holds every timestep. Batches of different sizes are padded with -1.
            both = gather(pad_across_processes(torch.stack([timesteps.float(), losses], dim=1), pad_index=-1))
            timesteps, losses = both[:, 0].long(), both[:, 1]
        if losses.device.type == "mps":  # which has no float64
            timesteps, losses = timesteps.cpu(), losses.cpu()
        self.history, self.counts = self.history.to(losses.device), self.counts.to(losses.device)
        # A single non-finite loss (e.g. an fp16 overflow) would spoil the distribution for good.
        valid = (timesteps >= 0) & losses.isfinite()

        # Replaces a loop over the examples, which would read each timestep on the host. The n-th occurrence of a
        # timestep in the batch goes n places further; if there are more occurrences than places, the last ones are
        # kept. The others are written to a spare row below the table.
        same = (timesteps[:, None] == timesteps[None, :]) & valid[:, None] & valid[None, :]
        earlier = same.tril(-1).sum(dim=1)
        kept = valid & (earlier >= same.sum(dim=1) - self.history_per_term)
        history = torch.cat([self.history, self.history.new_zeros(1, self.history_per_term)])
        counts = torch.cat([self.counts, self.counts.new_zeros(1)])
        spare = torch.full_like(timesteps, self.num_train_timesteps)
        rows = torch.where(kept, timesteps, spare)
        columns = (counts[rows] + earlier) % self.history_per_term
        self.history = history.index_put((rows, columns), losses.double())[:-1]
        self.counts = counts.index_add(0, torch.where(valid, timesteps, spare), torch.ones_like(timesteps))[:-1]

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"history": self.history.cpu().clone(), "counts": self.counts.cpu().clone()}

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Restores a state. Raises a `ValueError` for that of another sampler or other arguments."""
        saved = state_dict.get("history", torch.empty(0))
        if saved.shape != self.history.shape:
            raise ValueError(
                f"The saved state has a history of shape {tuple(saved.shape)}; this sampler's is "
                f"{tuple(self.history.shape)} (timesteps, losses per timestep). Resume with the former sampler."
            )
        self.history = saved.to(self.history)
        self.counts = state_dict["counts"].to(self.counts)


class BiasedTimestepSampler(TimestepSampler):
    r"""
    Draws some timesteps more (or less) often than the others, without weights that make up for it: the loss is another
    one, in which their share is larger. Late, noisy timesteps determine the content of an image, so more of them teach
    prompts faster, at the cost of details.

    Args:
        num_train_timesteps (`int`): Number T of training timesteps.
        begin, end (`int`): The timesteps in `[begin, end)` are biased.
        multiplier (`float`): How many times as often each of them is drawn as another one; positive.
    """

    def __init__(self, num_train_timesteps: int, begin: int, end: int, multiplier: float):
        super().__init__(num_train_timesteps)
        if not 0 <= begin < end <= num_train_timesteps:
            raise ValueError(
                f"The biased timesteps are [{begin}, {end}); they must lie in [0, {num_train_timesteps}), and be at "
                "least one."
            )
        if not (math.isfinite(multiplier) and multiplier > 0):
            raise ValueError(f"`multiplier` is {multiplier}; it must be a positive number.")
        self.begin, self.end, self.multiplier = begin, end, multiplier

    @classmethod
    def from_strategy(
        cls,
        num_train_timesteps: int,
        strategy: TimestepBiasStrategy,
        multiplier: float,
        portion: float = 0.25,
        begin: int = 0,
        end: int | None = None,
    ) -> BiasedTimestepSampler:
        """
        With the arguments of diffusers' SDXL training script: the first or the last `portion` of the timesteps
        ("earlier", "later"), or those in `[begin, end)` ("range"; `None`: to the last one).
        """
        number = int(portion * num_train_timesteps)
        if strategy != "range" and number == 0:
            raise ValueError(f"`portion` is {portion}, which is less than one of {num_train_timesteps} timesteps.")
        end = num_train_timesteps if end is None else end
        if strategy == "earlier":
            begin, end = 0, number
        elif strategy == "later":
            begin, end = num_train_timesteps - number, num_train_timesteps
        return cls(num_train_timesteps, begin, end, multiplier)

    def weights(self) -> torch.Tensor:
        weights = torch.ones(self.num_train_timesteps, dtype=torch.float64)
        weights[self.begin : self.end] = self.multiplier
        return weights

    def sample(
        self,
        batch_size: int,
        device: str | torch.device | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in the base class, but all weights are 1."""
        timesteps, weights = super().sample(batch_size, device, generator)
        return timesteps, torch.ones_like(weights)


TimestepSamplerName = Literal["uniform", "loss-second-moment"]
TimestepBiasStrategy = Literal["none", "earlier", "later", "range"]
TIMESTEP_SAMPLERS = {"uniform": UniformTimestepSampler, "loss-second-moment": LossSecondMomentTimestepSampler}
