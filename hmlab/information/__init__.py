"""Information measures, in bits: of given distributions, estimated from samples, and of running text by segments.

    from hmlab import information

    information.entropy(torch.tensor([0.5, 0.25, 0.25]))                     # 1.5
    information.estimate_entropy(torch.tensor([3, 1, 0, 2]))                 # of what the counts are samples of
    config = information.DensityConfig(densities=("surprisal", "kl"), segment=64)
    densities, statistics = information.segment_density(tokens, config.init_statistics(batch), config)
"""

from hmlab.information.density import DENSITIES, DensityConfig, Segments, segment_density
from hmlab.information.estimators import (
    ESTIMATORS,
    estimate_conditional_entropy,
    estimate_entropy,
    estimate_mutual_information,
    joint_counts,
    standard_error,
)
from hmlab.information.measures import (
    conditional_entropy,
    cross_entropy,
    entropy,
    js_divergence,
    kl_divergence,
    mutual_information,
    perplexity,
    prediction_bits,
    read_information,
    spectral_entropy,
)
from hmlab.information.statistics import Statistics

__all__ = [
    "DENSITIES",
    "ESTIMATORS",
    "DensityConfig",
    "Segments",
    "Statistics",
    "conditional_entropy",
    "cross_entropy",
    "entropy",
    "estimate_conditional_entropy",
    "estimate_entropy",
    "estimate_mutual_information",
    "joint_counts",
    "js_divergence",
    "kl_divergence",
    "mutual_information",
    "perplexity",
    "prediction_bits",
    "read_information",
    "segment_density",
    "spectral_entropy",
    "standard_error",
]
