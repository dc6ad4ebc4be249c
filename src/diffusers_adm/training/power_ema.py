"""
Power-function averages of the weights, their snapshots, and the reconstruction of averages of another length
(Karras et al. 2024, https://huggingface.co/papers/2312.02696, section 3 and appendix C).

After step t, the average of exponent gamma is the integral of p(tau) theta(tau) over training time, where
p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t] is its profile, and theta(tau) are the weights after step
ceil(tau). The length of an average is the standard deviation of its profile, relative to t: sigma_rel, here `std`. It
grows with the run, so that the first steps are soon forgotten.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .checkpoints import WRITING_PREFIX, flush_directory
from .sharding import copy_whole, local_tensors, whole_tensor


logger = logging.getLogger(__name__)

# The standard deviation of a uniform profile, gamma = 0. A longer average would favour the first steps of a run.
MAX_STD = 1 / math.sqrt(12)
SNAPSHOT_FOLDER = "power_ema"
SNAPSHOT_NAME = re.compile(r"step-(\d+)-std-([0-9.e-]+)\.safetensors")
STATE_NAME = "power_ema.safetensors"  # in a checkpoint
# Largest relative distance of profiles with which a reconstruction is accepted: 10 snapshots each of 0.05 and 0.1 reach
# 0.08 for 0.03, 0.008 for 0.075 and 0.05 for 0.2.
MAX_PROFILE_ERROR = 0.1

Profile = np.ndarray | float


# 1. Profiles, in float64


def check_std(name: str, std: float) -> None:
    """Raises a `ValueError` unless `std` is the relative standard deviation of a power-function average."""
    if not 0 < std <= MAX_STD:
        raise ValueError(
            f"`{name}` is {std}; it must be above 0 and at most 0.28867 (1 / sqrt(12)), the relative standard "
            "deviation of the plain mean over all steps. Usual values are 0.05 to 0.15."
        )


def std_of(gamma: float) -> float:
    """The standard deviation of the profile of exponent `gamma`, relative to training time; appendix C.1."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def gamma_of(std: float) -> float:
    """The exponent of the profile of relative standard deviation `std`: the inverse of `std_of`."""
    check_std("std", std)
    inverse = std**-2
    # (gamma + 2)^2 (gamma + 3) = inverse (gamma + 1) has one root of gamma > -1 that falls with std: the largest.
    return max(float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max()), 0.0)


def decay_complement(gamma: float, step: int) -> float:
    """
    1 - beta at `step` (the first is 1), where beta = (1 - 1 / step)^(gamma + 1) is the weight of the former average.
    It is 1 at the first step: the initial weights have no influence.
    """
    return 1.0 if step == 1 else -math.expm1((gamma + 1) * math.log1p(-1 / step))


def profile_products(steps: Profile, gammas: Profile, other_steps: Profile, other_gammas: Profile) -> np.ndarray:
    """
    Inner products of profiles, the integral of p q over training time, for arrays that broadcast. With m the earlier
    and M the later step, it is (gamma + 1) (other + 1) / (gamma + other + 1) (m / M)^(gamma of the later) / M.
    """
    earlier, later = np.minimum(steps, other_steps), np.maximum(steps, other_steps)
    gamma_of_later = np.where(steps > other_steps, gammas, other_gammas)
    scale = (gammas + 1) * (other_gammas + 1) / (gammas + other_gammas + 1)
    return scale * np.exp(gamma_of_later * np.log(earlier / later)) / later


def solve_profile(steps: np.ndarray, gammas: np.ndarray, step: int, gamma: float) -> tuple[np.ndarray, float]:
    """
    The combination of profiles that is nearest to that of `gamma` at `step`: A x = b of appendix C.3, where A and b are
    inner products of profiles. In addition to the paper, the coefficients sum to 1. Otherwise a constant weight would
    change, which with few snapshots is the largest error: with 10 snapshots each of two averages of a random walk, it
    makes the total two to eight times as large.

    Returns:
        `tuple`: The coefficients, float64; and the norm of the difference, relative to that of the profile.
    """
    steps = steps / step  # in units in which the products are of order 1
    products = profile_products(steps[:, None], gammas[:, None], steps, gammas)
    target = profile_products(steps, gammas, 1.0, gamma)
    # The conditions for a minimum with a Lagrange multiplier, in units in which each profile has the norm 1.
    units = 1 / np.sqrt(np.diag(products))
    system = np.zeros((len(steps) + 1, len(steps) + 1))
    system[:-1, :-1] = products * units[:, None] * units
    system[-1, :-1] = system[:-1, -1] = units
    # Least squares, because averages of nearly the same length make the system singular.
    solution = np.linalg.lstsq(system, np.append(target * units, 1.0), rcond=None)[0]
    coefficients = solution[:-1] * units
    norm = float(profile_products(1.0, gamma, 1.0, gamma))
    distance = coefficients @ products @ coefficients - 2 * coefficients @ target + norm
    return coefficients, math.sqrt(max(float(distance), 0.0) / norm)


# 2. Tracking


class PowerEMA:
    """
    Power-function averages of trained weights, updated after each optimizer step.

    Args:
        networks (mapping of `torch.nn.Module`): By the subfolder of the result that holds them (`""` for its root).
            Weights that require gradients are averaged.
        stds (sequence of `float`): The relative standard deviation of each average.

    Attributes:
        averages (list of lists of `torch.Tensor`): For each of `stds`, the float32 averages in the order of the
            parameters that require gradients.
    """

    def __init__(self, networks: Mapping[str, torch.nn.Module], stds: Sequence[float]):
        self.networks, self.stds = list(networks), list(stds)
        self.gammas = [gamma_of(std) for std in self.stds]
        parameters = trained_parameters(networks)
        self.names = list(parameters)
        self.averages = [[tensor.detach().float().clone() for tensor in parameters.values()] for _ in self.stds]

    @torch.no_grad()
    def step(self, parameters: Iterable[torch.nn.Parameter], step: int) -> None:
        """Adds the weights after `step` (the first is 1). Nothing waits for the device."""
        weights = [parameter.float() for parameter in local_tensors(parameters)]
        for gamma, averages in zip(self.gammas, self.averages, strict=True):
            torch._foreach_lerp_(local_tensors(averages), weights, decay_complement(gamma, step))

    def save(self, folder: str | os.PathLike, writes: bool = True) -> None:
        """
        Writes the averages into a checkpoint, in float32. Collective if the weights are split over processes, of which
        one `writes`.
        """
        tensors = {
            f"{std!r}/{name}": average.contiguous()
            for std, averages in zip(self.stds, self.averages, strict=True)
            for name, average in zip(self.names, self._whole(averages, writes), strict=True)
        }
        if not writes:
            return
        save_file(tensors, Path(folder, STATE_NAME), {"stds": json.dumps(self.stds)})

    def load(self, folder: str | os.PathLike) -> None:
        """Loads the averages of a checkpoint. Raises a `ValueError` if it holds none, or others."""
        path = Path(folder, STATE_NAME)
        if not path.is_file():
            raise ValueError(
                f"The checkpoint {folder} holds no power-function averages: its run had no `power_ema_stds`. They are "
                "averages since the first step. Resume it without `power_ema_stds`, or start a new run."
            )
        with safe_open(path, "pt") as file:
            stds = json.loads(file.metadata()["stds"])
            if stds != self.stds:
                raise ValueError(f"`power_ema_stds` is {self.stds}, and was {stds} for {folder}. Pass the latter.")
            expected = {f"{std!r}/{name}" for std in stds for name in self.names}
            if differing := sorted(expected ^ set(file.keys())):
                raise ValueError(
                    f"The averages of {folder} are those of other networks; they differ in {differing[0]!r}, for "
                    "example. Resume it with the networks that it was written with, or start a new run."
                )
            for std, averages in zip(stds, self.averages, strict=True):
                for name, average in zip(self.names, averages, strict=True):
                    copy_whole(average, file.get_tensor(f"{std!r}/{name}"))

    @staticmethod
    def _whole(averages: Iterable[torch.Tensor], keep: bool) -> list[torch.Tensor]:
        """The averages, gathered if they are split over processes, of which one keeps them."""
        wholes = []
        for average in averages:
            whole = whole_tensor(average)
            wholes.append(average if whole is average else whole.cpu() if keep else whole.new_empty(0))
        return wholes

    def save_snapshots(self, output_dir: str | os.PathLike, step: int, writes: bool = True) -> None:
        """
        Writes a float16 snapshot of each average into `output_dir/power_ema`, atomically. Raises a `RuntimeError` for
        values that float16 cannot hold. Collective as `save` is.
        """
        snapshots = [[average.half() for average in self._whole(averages, writes)] for averages in self.averages]
        if not writes:
            return
        finite = [torch.isfinite(tensor).all() for tensors in snapshots for tensor in tensors]
        if finite and not torch.stack(finite).all():  # waits for the device once
            raise RuntimeError(
                f"The power-function averages are not finite in float16 at step {step}, so no snapshot of them is "
                "saved. The run has diverged: resume an earlier checkpoint with a lower `--learning_rate`."
            )
        folder = Path(output_dir, SNAPSHOT_FOLDER)
        folder.mkdir(parents=True, exist_ok=True)
        for std, tensors in zip(self.stds, snapshots, strict=True):
            path = folder / f"step-{step:08d}-std-{std!r}.safetensors"
            writing = path.with_name(f"{WRITING_PREFIX}{path.name}")
            metadata = {"step": str(step), "sigma_rel": repr(std), "networks": json.dumps(self.networks)}
            named = zip(self.names, tensors, strict=True)
            save_file({name: tensor.contiguous() for name, tensor in named}, writing, metadata)
            _finish(writing, path)


def trained_parameters(networks: Mapping[str, torch.nn.Module]) -> dict[str, torch.nn.Parameter]:
    """
    The weights that require gradients, each once, by the names of snapshots: `unet/conv_in.weight`; without a slash for
    a network in the root. Their order is that of the parameters of the networks, one after the other.
    """
    found: dict[int, tuple[str, torch.nn.Parameter]] = {}
    for subfolder, network in networks.items():
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:  # one of two networks is listed under its first name
                found.setdefault(id(parameter), (f"{subfolder}/{name}" if subfolder else name, parameter))
    return dict(found.values())


# 3. Snapshots


@dataclass(frozen=True, order=True)
class Snapshot:
    """A float16 snapshot of one average."""

    step: int
    std: float
    path: Path


def find_snapshots(output_dir: str | os.PathLike) -> list[Snapshot]:
    """The snapshots in the folder of a run, by step."""
    folder = Path(output_dir, SNAPSHOT_FOLDER)
    matches = [(SNAPSHOT_NAME.fullmatch(path.name), path) for path in (folder.iterdir() if folder.is_dir() else ())]
    return sorted(Snapshot(int(match[1]), float(match[2]), path) for match, path in matches if match is not None)


def delete_snapshots(output_dir: str | os.PathLike, after_step: int = -1) -> None:
    """Deletes the snapshots of later steps than `after_step`, and half-written ones."""
    for path in Path(output_dir, SNAPSHOT_FOLDER).glob(f"{WRITING_PREFIX}*"):
        path.unlink()
    later = [snapshot for snapshot in find_snapshots(output_dir) if snapshot.step > after_step]
    for snapshot in later:
        snapshot.path.unlink()
    if later:
        logger.warning(
            "Deleted %d snapshots of steps %d to %d in %s: the run starts before them.",
            len(later),
            later[0].step,
            later[-1].step,
            later[0].path.parent,
        )


def continue_snapshots(output_dir: str | os.PathLike, checkpoint: str | os.PathLike | None, step: int) -> None:
    """
    Prepares the snapshots in `output_dir` for a run that continues after `step`: later ones are deleted. A run that
    branches off from the checkpoint of another folder starts with copies of the snapshots there. Call it on one
    process.
    """
    source = Path(output_dir) if checkpoint is None else Path(checkpoint).parent
    if source.resolve() == Path(output_dir).resolve():
        delete_snapshots(output_dir, step)
        return
    delete_snapshots(output_dir)
    earlier = [snapshot for snapshot in find_snapshots(source) if snapshot.step <= step]
    if not earlier:
        logger.warning(
            "There are no snapshots of power-function averages in %s: those of steps up to %d are missing for the "
            "reconstruction of other averages.",
            source,
            step,
        )
    folder = Path(output_dir, SNAPSHOT_FOLDER)
    folder.mkdir(parents=True, exist_ok=True)
    for snapshot in earlier:
        writing = folder / f"{WRITING_PREFIX}{snapshot.path.name}"
        shutil.copyfile(snapshot.path, writing)
        _finish(writing, folder / snapshot.path.name)


def _finish(writing: Path, path: Path) -> None:
    """Gives a completely written file its name."""
    with open(writing, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(writing, path)
    flush_directory(path.parent)


# 4. ReconstructionPlan


@dataclass(frozen=True)
class ReconstructionPlan:
    """An average as a combination of snapshots."""

    std: float
    step: int
    snapshots: list[Snapshot]
    coefficients: list[float]  # one for each snapshot; they sum to 1
    error: float  # norm of the difference of the profiles, relative to that of the profile of `std`


def plan_reconstruction(
    snapshots: Sequence[Snapshot], std: float, step: int | None = None, max_error: float = MAX_PROFILE_ERROR
) -> ReconstructionPlan:
    """
    Chooses the combination of `snapshots` that reconstructs the average of `std` after `step`; see `reconstruct`.
    Reads no file.
    """
    check_std("std", std)
    if not snapshots:
        raise ValueError(
            f"There are no snapshots of power-function averages. Train with `--power_ema_stds`; a run writes them into "
            f"{SNAPSHOT_FOLDER}."
        )
    steps = sorted({snapshot.step for snapshot in snapshots})
    step = steps[-1] if step is None else step
    if step not in steps:
        if step > steps[-1]:
            raise ValueError(f"`step` is {step}, but the last snapshot is of step {steps[-1]}. Choose an earlier one.")
        nearest = sorted(sorted(steps, key=lambda other: abs(other - step))[:2])
        raise ValueError(
            f"`step` is {step}, but there is no snapshot of that step. Choose one that has a snapshot; the nearest are "
            f"{' and '.join(map(str, nearest))}."
        )
    used = [snapshot for snapshot in snapshots if snapshot.step <= step]
    coefficients, error = solve_profile(
        np.array([snapshot.step for snapshot in used], dtype=np.float64),
        np.array([gamma_of(snapshot.std) for snapshot in used]),
        step,
        gamma_of(std),
    )
    if error > max_error:
        tracked = ", ".join(map(str, sorted({snapshot.std for snapshot in used})))
        raise ValueError(
            f"The {len(used)} snapshots up to step {step} (of `std` {tracked}) are too few for `std` {std}: the best "
            f"combination misses its profile by {error:.0%}, and `max_error` is {max_error:.0%}. Choose a value closer "
            "to those, or a later step, or train with smaller `--power_ema_snapshot_steps`."
        )
    return ReconstructionPlan(std, step, used, coefficients.tolist(), error)


def combine(plan: ReconstructionPlan) -> dict[str, torch.Tensor]:
    """
    Reads the snapshots of a plan, one after the other, and returns the combination in float32. Raises a `ValueError`
    for files that cannot be read, or that are not of the same networks.
    """
    first, result = plan.snapshots[0], dict[str, torch.Tensor]()
    networks, shapes = None, None
    for snapshot, coefficient in zip(plan.snapshots, plan.coefficients, strict=True):
        try:
            with safe_open(snapshot.path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"The snapshot {snapshot.path} cannot be read: {error}. Delete or restore it.") from error
        if (metadata.get("step"), metadata.get("sigma_rel")) != (str(snapshot.step), repr(snapshot.std)):
            raise ValueError(
                f"The snapshot {snapshot.path} was renamed: it is of step {metadata.get('step')} and of `std` "
                f"{metadata.get('sigma_rel')}. Restore its name."
            )
        found = metadata.get("networks"), {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        networks, shapes = (networks, shapes) if shapes is not None else found
        if found != (networks, shapes):
            names = [name for name in {**shapes, **found[1]} if shapes.get(name) != found[1].get(name)]
            differing = f", for example in {names[0]!r}" if names else ""
            raise ValueError(
                f"The snapshots {first.path} and {snapshot.path} are of different networks; they differ{differing}. "
                "Keep those of one run in a folder."
            )
        for name, tensor in tensors.items():
            if name not in result:
                result[name] = torch.zeros(tensor.shape, dtype=torch.float32)
            result[name].add_(tensor.float(), alpha=coefficient)
    return result


def reconstruct(
    snapshots: Sequence[Snapshot], std: float, step: int | None = None, max_error: float = MAX_PROFILE_ERROR
) -> dict[str, torch.Tensor]:
    """
    Reconstructs a power-function average that was not tracked, from the snapshots of those that were.

    Args:
        snapshots (sequence of `Snapshot`): From `find_snapshots`; those of later steps than `step` are not used.
        std (`float`): Relative standard deviation of the average, above 0 and at most `MAX_STD`.
        step (`int`, *optional*): A step with a snapshot; by default the last.
        max_error (`float`): Largest distance of the profiles, relative to the norm of that of `std`.

    Returns:
        `dict[str, torch.Tensor]`: The averages in float32, by the names of `trained_parameters`. For a `std` below
        those tracked, coefficients are large and amplify the rounding of the snapshots to float16.

    Raises:
        ValueError: For values out of range, too few snapshots, and snapshots of different networks.
    """
    return combine(plan_reconstruction(snapshots, std, step, max_error))
