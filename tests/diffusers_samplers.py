"""diffusers' schedulers that reverse the process of these networks, with options that make other samplers of them."""

import pytest
from diffusers.utils import is_torchsde_available


SAMPLERS = [
    ("DDPMScheduler", {}),
    ("DDPMScheduler", {"variance_type": "fixed_small"}),
    ("DDPMScheduler", {"variance_type": "fixed_large"}),
    ("DDPMParallelScheduler", {}),
    ("DDIMScheduler", {}),
    ("DDIMParallelScheduler", {}),
    ("PNDMScheduler", {}),
    ("PNDMScheduler", {"skip_prk_steps": True}),
    ("LMSDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {}),
    ("KDPM2DiscreteScheduler", {}),
    ("KDPM2AncestralDiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    ("DPMSolverSinglestepScheduler", {}),
    ("DPMSolverSDEScheduler", {}),
    ("UniPCMultistepScheduler", {}),
    ("DEISMultistepScheduler", {}),
    ("SASolverScheduler", {}),
    ("TCDScheduler", {}),
]
NAMES = list(dict.fromkeys(name for name, _ in SAMPLERS))
# These add noise of their own in every step; the others only where `algorithm_type` begins with "sde".
STOCHASTIC = (
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler",
    "SASolverScheduler",
    "TCDScheduler",
)
needs_torchsde = pytest.mark.skipif(not is_torchsde_available(), reason="DPMSolverSDEScheduler needs torchsde")


def as_parameters(samplers: list[tuple[str, dict]]) -> list:
    """For `pytest.mark.parametrize("name, options", ...)`."""
    return [
        pytest.param(
            name,
            options,
            id="-".join([name.removesuffix("Scheduler"), *map(str, options.values())]),
            marks=[needs_torchsde] if name == "DPMSolverSDEScheduler" else [],
        )
        for name, options in samplers
    ]
