"""
Compares samples with images by the features of a network: measures, networks and the command
`python -m diffusers_adm.evaluation.frechet`.
"""

from ...ops.frechet import GaussianStatistics, frechet_distance
from .comparison import ImageSetComparison, compare_image_sets
from .features import ClassifierFeatures, FeatureNetwork, InceptionFeatures
from .measures import inception_score, kernel_distance, mean_pairwise_distance, precision_recall


__all__ = [
    "ClassifierFeatures",
    "FeatureNetwork",
    "GaussianStatistics",
    "ImageSetComparison",
    "InceptionFeatures",
    "compare_image_sets",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "mean_pairwise_distance",
    "precision_recall",
]
