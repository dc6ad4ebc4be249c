"""
Coefficients of the Gaussian diffusion process, tabulated in float64 for all its timesteps.

Ho et al. 2020 (DDPM, https://huggingface.co/papers/2006.11239), Song et al. 2020 (DDIM,
https://huggingface.co/papers/2010.02502). `alphas_cumprod` is the papers' bar alpha_t.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple, TypeAlias

import numpy as np
import torch

from ..ops.values import check_plain_tensor, describe


# One timestep for all examples, or a tensor of integers with one for each.
Timesteps: TypeAlias = int | torch.Tensor
Coefficient: TypeAlias = float | torch.Tensor


class Coefficients(NamedTuple):
    """
    Coefficients at a timestep: numbers for one that the host knows, otherwise tensors of shape `(batch_size, 1, ...)`.
    """

    sqrt_alphas_cumprod: Coefficient
    sqrt_one_minus_alphas_cumprod: Coefficient
    sqrt_recip_alphas_cumprod: Coefficient
    sqrt_recipm1_alphas_cumprod: Coefficient
    posterior_mean_coef1: Coefficient  # of x_0 in the mean of q(x_{t-1} | x_t, x_0), DDPM eq. 7
    posterior_mean_coef2: Coefficient  # of x_t in it
    posterior_log_variance_clipped: Coefficient
    log_betas: Coefficient
    fixed_large_log_variance: Coefficient
    nonzero: Coefficient  # 0.0 at the last step of sampling, where no noise is added, else 1.0


class DDIMCoefficients(NamedTuple):
    """Additional coefficients of a DDIM step, for one eta."""

    sqrt_alphas_cumprod_prev: Coefficient
    sqrt_one_minus_alphas_cumprod: Coefficient
    std: Coefficient  # sigma, DDIM eq. 16
    direction: Coefficient  # of the predicted noise, DDIM eq. 12


class DiffusionProcess:
    """
    The diffusion process restricted to some timesteps, as tables computed once and uploaded once per device.

    Timesteps are looked up by their position among those kept. On a device, where checking would stall, a timestep that
    is not kept gets a position past the end, where every table is NaN: it cannot be mistaken for a valid one.

    Args:
        alphas_cumprod (`np.ndarray` of shape `(num_train_timesteps,)`): bar alpha at all training timesteps, float64;
            with float32 all tables are rounded to it.
        timesteps (list of `int`): The timesteps to keep, ascending. Their betas follow from their bar alpha.
        betas (`np.ndarray` of shape `(num_train_timesteps,)`, *optional*): Those of timesteps that are kept together
            with the one before, in place of such that follow from a rounded bar alpha.
    """

    def __init__(
        self, alphas_cumprod: np.ndarray, timesteps: Sequence[int] | np.ndarray, betas: np.ndarray | None = None
    ):
        self.timesteps = np.asarray(timesteps, dtype=np.int64)
        # The column of each training timestep in the tables; -1 for one that is not kept.
        self.positions = np.full(len(alphas_cumprod), -1, dtype=np.int64)
        self.positions[self.timesteps] = np.arange(len(self.timesteps))

        self._alphas_cumprod = alphas_cumprod = alphas_cumprod[self.timesteps]
        self._alphas_cumprod_prev = alphas_cumprod_prev = np.append(alphas_cumprod.dtype.type(1), alphas_cumprod[:-1])
        own_betas, betas = betas, 1 - alphas_cumprod / alphas_cumprod_prev
        if own_betas is not None:
            is_next = np.diff(self.timesteps, prepend=-1) == 1
            betas = np.where(is_next, own_betas[self.timesteps], betas)
        one_minus = 1 - alphas_cumprod
        posterior_variance = betas * (1 - alphas_cumprod_prev) / one_minus
        # beta_tilde is 0 at the first timestep, but the decoder needs its logarithm: that of the second one takes its
        # place, as in the papers' code. If there is only one timestep, beta is the only variance available.
        first = posterior_variance[1] if len(betas) > 1 else betas[0]
        with np.errstate(divide="ignore"):  # bar alpha_T = 0 with zero terminal SNR; those entries are not used then
            recip = 1 / alphas_cumprod
        tables = {
            "sqrt_alphas_cumprod": np.sqrt(alphas_cumprod),
            "sqrt_one_minus_alphas_cumprod": np.sqrt(one_minus),
            "sqrt_recip_alphas_cumprod": np.sqrt(recip),
            "sqrt_recipm1_alphas_cumprod": np.sqrt(recip - 1),
            "posterior_mean_coef1": betas * np.sqrt(alphas_cumprod_prev) / one_minus,
            "posterior_mean_coef2": (1 - alphas_cumprod_prev) * np.sqrt(1 - betas) / one_minus,
            "posterior_log_variance_clipped": np.log(np.append(first, posterior_variance[1:])),
            "log_betas": np.log(betas),
            "fixed_large_log_variance": np.log(np.append(first, betas[1:])),
            "nonzero": (np.arange(len(betas)) > 0).astype(np.float64),
        }
        # Tables of shape `(names, steps)`: of `Coefficients` under `None`, of `DDIMCoefficients` under eta and dtype.
        self._tables: dict[tuple[float, torch.dtype] | None, np.ndarray] = {
            None: np.stack([tables[name] for name in Coefficients._fields])
        }
        self._uploads: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}

    def check(self, timestep: Timesteps, sample: torch.Tensor) -> Timesteps:
        """
        Checks timesteps as far as the host knows them.

        Returns:
            `int` or `torch.Tensor`: An `int` if the host knows one timestep for all examples, else a tensor of shape
            `(batch_size,)` or `()` on the device of `sample`.

        Raises:
            ValueError: If `timestep` holds no integers, is not kept, or is neither one number nor one per example.
        """
        if not torch.is_tensor(timestep):
            return self._check_number(timestep)
        if timestep.device.type != "meta":
            check_plain_tensor("timestep", timestep)
        if timestep.is_floating_point() or timestep.dtype == torch.bool:
            raise ValueError(f"`timestep` is of type {timestep.dtype}; timesteps must be integers.")
        if timestep.ndim > 1 or (timestep.ndim == 1 and timestep.shape[0] not in (1, sample.shape[0])):
            raise ValueError(
                f"`timestep` has shape {tuple(timestep.shape)} for {sample.shape[0]} examples. Pass one number, or one "
                "for each example."
            )
        if timestep.device.type == "cpu":  # reading it costs nothing; on another device it would stall
            if timestep.numel() == 1:
                return self._check_number(int(timestep))
            for value in timestep.unique().tolist():
                self._check_number(value)
        return timestep.to(device=sample.device, dtype=torch.long)

    def _check_number(self, timestep: Timesteps) -> int:
        if not isinstance(timestep, Real) or timestep % 1:
            raise ValueError(f"`timestep` is {describe(timestep)}; timesteps must be integers.")
        timestep, last = int(timestep), len(self.positions) - 1
        if not 0 <= timestep <= last:
            raise ValueError(f"`timestep` is {timestep}; training timesteps go from 0 to {last}.")
        if self.positions[timestep] < 0:
            raise ValueError(
                f"`timestep` is {timestep}, which is not one of the {len(self.timesteps)} timesteps chosen by "
                "`set_timesteps` (or by `timestep_respacing`). Take them from `scheduler.timesteps`."
            )
        return timestep

    def previous(self, timestep: Timesteps) -> int:
        """Returns the timestep that is kept before `timestep`, which is read on the host; -1 before the first one."""
        position = self.positions[self._check_number(int(timestep.item()) if torch.is_tensor(timestep) else timestep)]
        return int(self.timesteps[position - 1]) if position > 0 else -1

    def lookup(self, timestep: Timesteps, like: torch.Tensor) -> Coefficients:
        """
        Returns the coefficients at a `timestep` that [`~DiffusionProcess.check`] returned. Tensors have the device and
        number of dimensions of `like`, and its dtype if that is not less than float32.
        """
        return Coefficients(*self._columns(None, timestep, like))

    def lookup_ddim(self, eta: float, timestep: Timesteps, like: torch.Tensor) -> DDIMCoefficients:
        """Returns those of a DDIM step, from tables that are computed *in* the dtype of `like`, once for each `eta`."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        if (eta, dtype) not in self._tables:
            # In the working precision and in the order of guided-diffusion's code. At small t, 1 - bar alpha loses
            # digits in float32; with float64 tables, guided samples differed from that code's by up to 1%.
            precision = np.float32 if dtype == torch.float32 else np.float64
            alpha, alpha_prev = self._alphas_cumprod.astype(precision), self._alphas_cumprod_prev.astype(precision)
            # Betas below 1e-8 vanish in float32. A step that starts from no noise adds none.
            share = np.divide(1 - alpha_prev, 1 - alpha, out=np.zeros_like(alpha), where=alpha_prev < 1)
            std = eta * np.sqrt(share) * np.sqrt(1 - alpha / alpha_prev)
            tables = {
                "sqrt_alphas_cumprod_prev": np.sqrt(alpha_prev),
                "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - alpha),
                "std": std,
                # With eta = 1 the noise takes all of the variance, and rounding can leave a small negative number.
                "direction": np.sqrt(np.maximum(1 - alpha_prev - std**2, 0)),
            }
            self._tables[eta, dtype] = np.stack([tables[name] for name in DDIMCoefficients._fields])
        return DDIMCoefficients(*self._columns((eta, dtype), timestep, like))

    def _columns(
        self, key: tuple[float, torch.dtype] | None, timestep: Timesteps, like: torch.Tensor
    ) -> Sequence[Coefficient]:
        """Returns the entries at `timestep` of the tables under `key`."""
        if isinstance(timestep, int):
            return self._tables[key][:, self.positions[timestep]].tolist()
        tables, positions = self._on_device(key, like.device)
        # `index_select` with a vector, because indexing with a tensor without dimensions reads it on the host.
        columns = positions.index_select(0, timestep.reshape(-1))
        # All rows at once, even if few are needed: on a device, time goes with the number of operations.
        entries = tables.index_select(1, columns).to(torch.promote_types(like.dtype, torch.float32))
        return entries.reshape(len(tables), -1, *[1] * (like.ndim - 1)).unbind()

    def _on_device(
        self, key: tuple[float, torch.dtype] | None, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns `(names, steps + 1)` tables, whose last column is NaN, and `(num_train_timesteps,)` positions."""
        if (key, device) not in self._uploads:
            tables = torch.from_numpy(np.pad(self._tables[key], ((0, 0), (0, 1)), constant_values=np.nan))
            if device.type == "mps":  # which has no float64
                tables = tables.float()
            positions = np.where(self.positions < 0, len(self.timesteps), self.positions)
            self._uploads[key, device] = tables.to(device), torch.from_numpy(positions).to(device)
        return self._uploads[key, device]
