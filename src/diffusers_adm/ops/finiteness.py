"""Results that are not finite: which they are, and the likely reason."""

from collections.abc import Mapping

import torch


MAX_NUMBERS = 10  # in a message


def not_finite(values: torch.Tensor) -> list[int]:
    """Indices of the rows of `values` with NaN or infinity. Waits for the device."""
    return torch.nonzero(~values.flatten(1).isfinite().all(dim=1))[:, 0].tolist()


def count_not_finite(values: torch.Tensor, kind: str) -> str | None:
    """
    How many rows of `values` hold NaN or infinity, and which, for a message: "2 of 4 images (numbers 0, 3, counted from
    0)"; `None` if there are none. `kind`: what a row is, in the plural. Waits for the device.
    """
    bad = not_finite(values)
    if not bad:
        return None
    numbers = ", ".join(map(str, bad[:MAX_NUMBERS])) + ", ..." * (len(bad) > MAX_NUMBERS)
    return f"{len(bad)} of {len(values)} {kind} (numbers {numbers}, counted from 0)"


def explain_weights(name: str, network: torch.nn.Module) -> str | None:
    """What is wrong with the weights of a network that the user knows by this name; `None` if all are finite."""
    network = getattr(network, "_orig_mod", network)  # below the wrapper of `torch.compile`
    for parameter, weight in network.named_parameters():
        if not weight.isfinite().all():
            return (
                f"Weights of `{name}` are not finite themselves, such as `{parameter}`: its training diverged, or its "
                "file is damaged. Use an earlier checkpoint, or download it again."
            )
    return None


def explain_not_finite(networks: Mapping[str, torch.nn.Module]) -> str:
    """
    Likely reason why networks returned values that are not finite, and what to do, as sentences for a message.

    Args:
        networks (mapping of `torch.nn.Module`): The networks, by the names that the user knows.
    """
    for name, network in networks.items():
        wrong = explain_weights(name, network)
        if wrong is not None:
            return wrong
    dtypes = {name: _dtype_in_use(network) for name, network in networks.items()}
    overflowing = [f"`{name}`" for name, dtype in dtypes.items() if dtype == torch.float16]
    if overflowing:
        return (
            f"{' and '.join(overflowing)} ran in float16, where numbers above 65504 overflow. Use bfloat16 or float32."
        )
    return (
        "All weights are finite, so activations overflowed: after a training that diverged, with a very large guidance "
        "scale, or with inputs that are not finite."
    )


def _dtype_in_use(network: torch.nn.Module) -> torch.dtype | None:
    """The dtype of most of its operations, mixed precision included."""
    parameter = next(network.parameters(), None)
    if parameter is None:
        return None
    kind = parameter.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else parameter.dtype
