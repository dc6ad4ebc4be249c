"""
What the training scripts share: functions and small objects that never own the loop.

Importing it needs the core dependencies alone; what reads data, recipes or draws curves imports `datasets`, `yaml` and
`matplotlib` (the `train` extra) when it is called.
"""

from .arguments import parse_args
from .checkpoints import (
    TrainingProgress,
    delete_checkpoints,
    find_latest_checkpoint,
    resume_checkpoint,
    save_checkpoint,
)
from .data import (
    EpochShuffleSampler,
    ImageDataset,
    UnusableImageError,
    check_batch_fits,
    check_images,
    decode_rgb,
    load_image_dataset,
)
from .ema import ema_weights
from .images import labelled_grid
from .losses import TrainingLosses, check_objective, min_snr_weights, training_losses
from .metrics import LossMetrics, MetricsHistory, plot_loss_curves
from .repositories import from_subfolder_or_root, reading
from .seeding import derive_seed, seed_step
from .timestep_samplers import LossSecondMomentTimestepSampler, TimestepSampler, UniformTimestepSampler


__all__ = [
    "EpochShuffleSampler",
    "ImageDataset",
    "LossMetrics",
    "LossSecondMomentTimestepSampler",
    "MetricsHistory",
    "TimestepSampler",
    "TrainingLosses",
    "TrainingProgress",
    "UniformTimestepSampler",
    "UnusableImageError",
    "check_batch_fits",
    "check_images",
    "check_objective",
    "decode_rgb",
    "delete_checkpoints",
    "derive_seed",
    "ema_weights",
    "find_latest_checkpoint",
    "from_subfolder_or_root",
    "labelled_grid",
    "load_image_dataset",
    "min_snr_weights",
    "parse_args",
    "plot_loss_curves",
    "reading",
    "resume_checkpoint",
    "save_checkpoint",
    "seed_step",
    "training_losses",
]
