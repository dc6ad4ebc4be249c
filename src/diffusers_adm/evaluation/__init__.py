"""
Measures of trained models, and the samples to take them of. Importing it needs the core dependencies alone; what draws
curves or reads data imports `matplotlib` and `datasets` (the `eval` extra) when it is called.
"""

# The name is the function from here on; the sub-package of the same name, which is what `python -m` runs, is loaded.
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
    "mean_pairwise_distance",
    "precision_recall",
    "sample_images",
]
