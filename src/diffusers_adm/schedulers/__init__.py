"""Noise schedules, diffusion processes and their schedulers."""

from .scheduling_ddpm_learned_variance import LearnedVarianceDDPMScheduler
from .timestep_spacing import respaced_timesteps


__all__ = ["LearnedVarianceDDPMScheduler", "respaced_timesteps"]
