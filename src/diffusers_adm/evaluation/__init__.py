"""
Measures of trained models: bits per dimension on images, and comparisons of samples with images; and the samples.

To add a measure of samples: a function of features or class probabilities in `frechet/measures.py`, and its value in
`compare_image_sets` (`frechet/comparison.py`), which `python -m diffusers_adm.evaluation.frechet` prints. A measure of
the model itself: a package like `bits_per_dim/`, with `__main__.py` for the command.

The import needs only the core dependencies; plots and data import the `eval` extra when they are used.
"""

# From here on the name is the function, and no longer the sub-package, which `python -m` still finds.
from .bits_per_dim import BitsPerDim, bits_per_dim
from .frechet import (
    ClassifierFeatures,
    FeatureNetwork,
    GaussianStatistics,
    ImageSetComparison,
    InceptionFeatures,
    compare_image_sets,
    frechet_distance,
    inception_score,
    kernel_distance,
    mean_pairwise_distance,
    precision_recall,
)
from .sample import sample_images


__all__ = [
    "BitsPerDim",
    "ClassifierFeatures",
    "FeatureNetwork",
    "GaussianStatistics",
    "ImageSetComparison",
    "InceptionFeatures",
    "bits_per_dim",
    "compare_image_sets",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "mean_pairwise_distance",
    "precision_recall",
    "sample_images",
]
