"""Exponential moving average of the weights: diffusers' `EMAModel`, and a swap that cannot be forgotten."""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel

from .lora import has_adapter, load_lora


@contextmanager
def ema_weights(ema: EMAModel, parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """
    Puts the averaged weights into `parameters` for the duration of a `with` block.

    The trained weights come back when the block ends, exceptions and interrupts included: otherwise a failed validation
    that is caught upstream would let training go on from the averaged weights.

    Args:
        ema (`EMAModel`): Holds one average for each of `parameters`, in their order.
        parameters (iterable of `torch.nn.Parameter`): The parameters to swap; a generator will do.

    Raises:
        RuntimeError: If the averaged weights are already swapped in (`EMAModel` has room for one set of weights).
    """
    if ema.temp_stored_params is not None:
        raise RuntimeError(
            "The averaged weights are already swapped in: `ema_weights` cannot be nested, because the inner block "
            "would overwrite the stored weights. Enter it once, around everything that needs the averaged weights."
        )
    # Read three times below; `model.parameters()` is a generator and would be empty at the second.
    parameters = list(parameters)
    ema.store(parameters)
    try:
        ema.copy_to(parameters)
        yield
    finally:
        ema.restore(parameters)


def result_weights(ema: EMAModel | None, parameters: Iterable[torch.nn.Parameter]) -> AbstractContextManager[None]:
    """`ema_weights`, or nothing where there is no average: the weights that a run saves as its result."""
    return ema_weights(ema, parameters) if ema is not None else nullcontext()


def load_average(
    ema: EMAModel,
    parameters: Iterable[torch.nn.Parameter],
    networks: Mapping[str, torch.nn.Module],
    folder: str | os.PathLike,
) -> None:
    """
    Reads the averaged weights out of a result that was saved with them. The trained weights are overwritten by them:
    load those afterwards.

    Args:
        ema (`EMAModel`): Of `parameters`.
        parameters (iterable of `torch.nn.Parameter`): Those of `networks` that are trained.
        networks (mapping of `torch.nn.Module`): By the subfolder of `folder` that holds them ("" for its root): models
            of diffusers or transformers, or a U-Net with an adapter.
        folder (`str` or `os.PathLike`): What was saved.
    """
    for subfolder, network in networks.items():
        if has_adapter(network):
            load_lora(network, folder)
            continue
        kwargs = {} if isinstance(network, ModelMixin) else {"dtype": torch.float32}
        saved = type(network).from_pretrained(os.path.join(folder, subfolder), **kwargs)  # type: ignore[attr-defined]
        # Not by their order: a class embedding that a network was given comes last there, and earlier where it is made.
        averages = dict(saved.named_parameters())
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.copy_(averages[name])
    ema.shadow_params = [parameter.detach().clone() for parameter in parameters]


@contextmanager
def evaluation_weights(
    model: torch.nn.Module, ema: EMAModel | None, parameters: Iterable[torch.nn.Parameter] | None = None
) -> Iterator[None]:
    """
    `model` in evaluation mode with the averaged weights, if there are any; afterwards as it is trained. The average is
    of `parameters`; None: of all those of `model`.
    """
    model.eval()
    try:
        averaged = model.parameters() if parameters is None else parameters
        with result_weights(ema, averaged):
            yield
    finally:
        model.train()
