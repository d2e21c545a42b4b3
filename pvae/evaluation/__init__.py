"""Evaluation: what a trained model and guide are worth, with the evidence attached."""

from .activity import Activity, active_units
from .alignment import AlignmentReport, Measure, alignment_report
from .attributes import Accuracy, Combination, LabelScores, RareScore, label_scores, rare_combinations
from .estimate import LikelihoodEstimate
from .features import FeatureExtractor, LabelClassifier, fit_classifier
from .frechet import frechet_distance, frechet_interval, mean_pairwise_distance, nearest_distance
from .interval import Interval, bootstrap_intervals
from .jacobian import JacobianReport, jacobian_report
from .likelihood import log_likelihood
from .pareto import khat_threshold, pareto_khat
from .similarity import linear_cka, linear_r2, pearson
from .two_sample import (
    C2ST,
    MMDTest,
    classifier_two_sample,
    gaussian_w2,
    mmd2,
    mmd_interval,
    mmd_permutation,
)

__all__ = [
    "C2ST",
    "Accuracy",
    "Activity",
    "AlignmentReport",
    "Combination",
    "FeatureExtractor",
    "Interval",
    "JacobianReport",
    "LabelClassifier",
    "LabelScores",
    "LikelihoodEstimate",
    "MMDTest",
    "Measure",
    "RareScore",
    "active_units",
    "alignment_report",
    "bootstrap_intervals",
    "classifier_two_sample",
    "fit_classifier",
    "frechet_distance",
    "frechet_interval",
    "gaussian_w2",
    "jacobian_report",
    "khat_threshold",
    "label_scores",
    "linear_cka",
    "linear_r2",
    "log_likelihood",
    "mean_pairwise_distance",
    "mmd2",
    "mmd_interval",
    "mmd_permutation",
    "nearest_distance",
    "pareto_khat",
    "pearson",
    "rare_combinations",
]
