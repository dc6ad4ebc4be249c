"""Exponential moving average of the weights: swapping it in and out, and loading it from a result."""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel

from .lora import load_lora
from .sharding import class_of, copy_whole, local_parameters


class WeightAverage(EMAModel):
    """
    diffusers' `EMAModel` with a step that reads each weight once. That of `EMAModel` writes all differences to memory
    first, which takes twice as long. The averages are the same within rounding, and are saved and loaded alike.
    """

    @torch.no_grad()
    def step(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Adds the weights after an optimizer step. All of them are averaged, or copied in the first step."""
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        torch._foreach_lerp_(self.shadow_params, list(parameters), 1 - self.cur_decay_value)


@contextmanager
def ema_weights(ema: EMAModel, parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """
    Puts the averaged weights (one for each of `parameters`, in their order) into `parameters` for the duration of a
    `with` block, and the trained ones back at its end, also after an exception: training must not go on from the
    averaged weights. Raises a `RuntimeError` if they are already swapped in: the trained ones would be lost.
    """
    if ema.temp_stored_params is not None:
        raise RuntimeError("`ema_weights` cannot be nested.")
    parameters = local_parameters(parameters)  # in a list; `model.parameters()` is a generator
    ema.store(parameters)
    try:
        ema.copy_to(parameters)
        yield
    finally:
        ema.restore(parameters)


def result_weights(ema: EMAModel | None, parameters: Iterable[torch.nn.Parameter]) -> AbstractContextManager[None]:
    """`ema_weights`, or the trained ones without an average: the weights that a run saves as its result."""
    return ema_weights(ema, parameters) if ema is not None else nullcontext()


def load_average(
    ema: EMAModel,
    parameters: Iterable[torch.nn.Parameter],
    networks: Mapping[str, torch.nn.Module],
    folder: str | os.PathLike,
) -> None:
    """
    Loads the averaged weights from a result that was saved with them. They also overwrite the weights of `networks`:
    load the trained ones afterwards.

    Args:
        ema (`EMAModel`): The average of `parameters`, the trained weights of `networks`.
        networks (mapping of `torch.nn.Module`): By the subfolder of `folder` that holds them (`""` for its root):
            models of diffusers or transformers, or a U-Net with an adapter.
    """
    for subfolder, network in networks.items():
        if getattr(network, "peft_config", None):  # it has an adapter
            load_lora(network, folder)
            continue
        kwargs = {} if isinstance(network, ModelMixin) else {"dtype": torch.float32}
        saved = class_of(network).from_pretrained(os.path.join(folder, subfolder), **kwargs)  # type: ignore[attr-defined]
        # By name, not by order: a class embedding that was added to a pretrained network is its last module.
        averages = dict(saved.named_parameters())
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                copy_whole(parameter, averages[name])
    ema.shadow_params = [parameter.detach().clone() for parameter in local_parameters(parameters)]


@contextmanager
def evaluation_weights(
    model: torch.nn.Module, ema: EMAModel | None, parameters: Iterable[torch.nn.Parameter] | None = None
) -> Iterator[None]:
    """
    Puts `model` into evaluation mode with the averaged weights, if there are any, for the duration of a `with` block.
    The average is that of `parameters`; None: of all parameters of `model`.
    """
    model.eval()
    try:
        averaged = model.parameters() if parameters is None else parameters
        with result_weights(ema, averaged):
            yield
    finally:
        model.train()
