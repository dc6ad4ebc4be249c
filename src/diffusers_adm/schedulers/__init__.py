"""Noise schedules, reverse processes and their distributions."""

from .scheduling_ddpm_learned_variance import LearnedVarianceDDPMScheduler, respaced_timesteps


__all__ = ["LearnedVarianceDDPMScheduler", "respaced_timesteps"]
