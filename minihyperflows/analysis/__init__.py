"""Measures and statistics that chapters and studies share; nothing here trains or reads a file."""

from minihyperflows.analysis.correlation import dominance, interval, ranks, spearman
from minihyperflows.analysis.differences import Difference, paired_differences
from minihyperflows.analysis.exponents import Exponent, exponent
from minihyperflows.analysis.masks import expected_by_size, joined, margins, masks_of, overlap
from minihyperflows.analysis.networks import perceptron, small_convnet
from minihyperflows.analysis.pace import planned_sparsity
from minihyperflows.analysis.removed import decay_matrix, decayed, travel
from minihyperflows.analysis.support import Supports, supports
from minihyperflows.analysis.worth import Probe, worths

__all__ = [
    "Difference",
    "Exponent",
    "Probe",
    "Supports",
    "decay_matrix",
    "decayed",
    "dominance",
    "expected_by_size",
    "exponent",
    "interval",
    "joined",
    "margins",
    "masks_of",
    "overlap",
    "paired_differences",
    "perceptron",
    "planned_sparsity",
    "ranks",
    "small_convnet",
    "spearman",
    "supports",
    "travel",
    "worths",
]
