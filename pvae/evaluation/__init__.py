"""Evaluation: what a trained model and guide are worth, with the evidence attached."""

from .activity import Activity, active_units
from .agreement import DensityAgreement, density_agreement
from .alignment import AlignmentReport, Measure, alignment_report
from .annealing import AnnealedEstimate, annealed_likelihood
from .arviz import to_arviz
from .attributes import Accuracy, Combination, LabelScores, RareScore, label_scores, rare_combinations
from .auroc import auroc, auroc_interval, roc_curve
from .bidirectional import BidirectionalEstimate, bidirectional
from .bits import bits_per_dimension
from .c2st import C2ST, classifier_test, classifier_two_sample
from .calibration import (
    CoverageCurve,
    RankCalibration,
    aggregate_calibration,
    simulation_based_calibration,
)
from .complexity import compressed_bits, pixel_levels
from .conformal import (
    ConformalLevel,
    ConformalTest,
    benjamini_hochberg,
    conformal_p_values,
    conformal_test,
)
from .coverage import PriorCoverage, SyntheticKL, energy_distance, prior_coverage, synthetic_kl
from .defensive import DefensiveGuide
from .estimate import LikelihoodEstimate
from .features import FeatureExtractor, LabelClassifier, fit_classifier
from .frechet import frechet_distance, frechet_interval, mean_pairwise_distance, nearest_distance
from .gaps import InferenceGaps, inference_gaps
from .holes import Holes, find_holes
from .inception import inception_features
from .interval import Interval, bootstrap_intervals
from .jacobian import JacobianReport, jacobian_report
from .jacobian_monitor import JacobianMonitor
from .kernel_distance import KernelDistance, kernel_distance
from .latent_scores import LatentScores, best_labels, latent_scores
from .layers import Exchange, Layer, LayerReport, exchanged_kl, layer_report
from .likelihood import log_likelihood
from .likelihood_regret import LikelihoodRegret, likelihood_regret
from .mahalanobis import CodeCloud, fit_cloud
from .marginals import Marginals
from .mutual_information import MutualInformation, mutual_information
from .nested import NestedEstimate, nested_likelihood
from .ood import Detector, OODReport, compare_scores, label_candidates, ood_report
from .ood_scores import (
    FamiliarData,
    OODDetection,
    OODScore,
    OODScores,
    detect,
    familiar_data,
    ood_scores,
)
from .pareto import khat_share, khat_threshold, pareto_khat
from .precision_recall import PrecisionRecall, precision_recall
from .predictive import PredictiveCheck, PredictiveStatistic, predictive_check
from .prior_match import PriorMatch, prior_match
from .rate_distortion import RateDistortion, rate_distortion
from .sample_quality import SampleQuality, sample_quality
from .similarity import linear_cka, linear_r2, pearson
from .two_sample import MMDTest, gaussian_w2, mmd2, mmd_interval, mmd_permutation
from .typicality import typicality
from .whitening import whitened

__all__ = [
    "C2ST",
    "Accuracy",
    "Activity",
    "AlignmentReport",
    "AnnealedEstimate",
    "BidirectionalEstimate",
    "CodeCloud",
    "Combination",
    "ConformalLevel",
    "ConformalTest",
    "CoverageCurve",
    "DefensiveGuide",
    "DensityAgreement",
    "Detector",
    "Exchange",
    "FamiliarData",
    "FeatureExtractor",
    "Holes",
    "InferenceGaps",
    "Interval",
    "JacobianMonitor",
    "JacobianReport",
    "KernelDistance",
    "LabelClassifier",
    "LabelScores",
    "LatentScores",
    "Layer",
    "LayerReport",
    "LikelihoodEstimate",
    "LikelihoodRegret",
    "MMDTest",
    "Marginals",
    "Measure",
    "MutualInformation",
    "NestedEstimate",
    "OODDetection",
    "OODReport",
    "OODScore",
    "OODScores",
    "PrecisionRecall",
    "PredictiveCheck",
    "PredictiveStatistic",
    "PriorCoverage",
    "PriorMatch",
    "RankCalibration",
    "RareScore",
    "RateDistortion",
    "SampleQuality",
    "SyntheticKL",
    "active_units",
    "aggregate_calibration",
    "alignment_report",
    "annealed_likelihood",
    "auroc",
    "auroc_interval",
    "benjamini_hochberg",
    "best_labels",
    "bidirectional",
    "bits_per_dimension",
    "bootstrap_intervals",
    "classifier_test",
    "classifier_two_sample",
    "compare_scores",
    "compressed_bits",
    "conformal_p_values",
    "conformal_test",
    "density_agreement",
    "detect",
    "energy_distance",
    "exchanged_kl",
    "familiar_data",
    "find_holes",
    "fit_classifier",
    "fit_cloud",
    "frechet_distance",
    "frechet_interval",
    "gaussian_w2",
    "inception_features",
    "inference_gaps",
    "jacobian_report",
    "kernel_distance",
    "khat_share",
    "khat_threshold",
    "label_candidates",
    "label_scores",
    "latent_scores",
    "layer_report",
    "likelihood_regret",
    "linear_cka",
    "linear_r2",
    "log_likelihood",
    "mean_pairwise_distance",
    "mmd2",
    "mmd_interval",
    "mmd_permutation",
    "mutual_information",
    "nearest_distance",
    "nested_likelihood",
    "ood_report",
    "ood_scores",
    "pareto_khat",
    "pearson",
    "pixel_levels",
    "precision_recall",
    "predictive_check",
    "prior_coverage",
    "prior_match",
    "rare_combinations",
    "rate_distortion",
    "roc_curve",
    "sample_quality",
    "simulation_based_calibration",
    "synthetic_kl",
    "to_arviz",
    "typicality",
    "whitened",
]
