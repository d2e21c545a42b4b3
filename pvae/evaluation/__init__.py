"""Evaluation: what a trained model and guide are worth, with the evidence attached."""

from .activity import Activity, active_units
from .agreement import DensityAgreement, density_agreement
from .alignment import AlignmentReport, Measure, alignment_report
from .attributes import Accuracy, Combination, LabelScores, RareScore, label_scores, rare_combinations
from .auroc import auroc, auroc_interval, roc_curve
from .bits import bits_per_dimension
from .conformal import (
    ConformalLevel,
    ConformalTest,
    benjamini_hochberg,
    conformal_p_values,
    conformal_test,
)
from .coverage import PriorCoverage, SyntheticKL, energy_distance, prior_coverage, synthetic_kl
from .estimate import LikelihoodEstimate
from .features import FeatureExtractor, LabelClassifier, fit_classifier
from .frechet import frechet_distance, frechet_interval, mean_pairwise_distance, nearest_distance
from .interval import Interval, bootstrap_intervals
from .jacobian import JacobianReport, jacobian_report
from .jacobian_monitor import JacobianMonitor
from .latent_scores import LatentScores, best_labels, latent_scores
from .layers import Exchange, Layer, LayerReport, exchanged_kl, layer_report
from .likelihood import log_likelihood
from .nested import NestedEstimate, nested_likelihood
from .ood import Detector, OODReport, compare_scores, label_candidates, ood_report
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
    "ConformalLevel",
    "ConformalTest",
    "DensityAgreement",
    "Detector",
    "Exchange",
    "FeatureExtractor",
    "Interval",
    "JacobianMonitor",
    "JacobianReport",
    "LabelClassifier",
    "LabelScores",
    "LatentScores",
    "Layer",
    "LayerReport",
    "LikelihoodEstimate",
    "MMDTest",
    "Measure",
    "NestedEstimate",
    "OODReport",
    "PriorCoverage",
    "RareScore",
    "SyntheticKL",
    "active_units",
    "alignment_report",
    "auroc",
    "auroc_interval",
    "benjamini_hochberg",
    "best_labels",
    "bits_per_dimension",
    "bootstrap_intervals",
    "classifier_two_sample",
    "compare_scores",
    "conformal_p_values",
    "conformal_test",
    "density_agreement",
    "energy_distance",
    "exchanged_kl",
    "fit_classifier",
    "frechet_distance",
    "frechet_interval",
    "gaussian_w2",
    "jacobian_report",
    "khat_threshold",
    "label_candidates",
    "label_scores",
    "latent_scores",
    "layer_report",
    "linear_cka",
    "linear_r2",
    "log_likelihood",
    "mean_pairwise_distance",
    "mmd2",
    "mmd_interval",
    "mmd_permutation",
    "nearest_distance",
    "nested_likelihood",
    "ood_report",
    "pareto_khat",
    "pearson",
    "prior_coverage",
    "rare_combinations",
    "roc_curve",
    "synthetic_kl",
]
