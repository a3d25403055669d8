"""Statistics of layer inputs, from sums over tokens to a factored Hessian. Pure computation on tensors."""

from crosscal.statistics.factor import InverseFactor, factor
from crosscal.statistics.gradients import Gradient, GradientSums
from crosscal.statistics.mixture import MeanSum, Mixture
from crosscal.statistics.moments import InputMoments, MomentsAccumulator
from crosscal.statistics.statistic import EVERY, OF_TWO_STREAMS, VECTORS, Statistic, streams_of

__all__ = [
    "EVERY",
    "OF_TWO_STREAMS",
    "VECTORS",
    "Gradient",
    "GradientSums",
    "InputMoments",
    "InverseFactor",
    "MeanSum",
    "Mixture",
    "MomentsAccumulator",
    "Statistic",
    "factor",
    "streams_of",
]
