"""What layers saw, from sums over tokens to a factored Hessian. Pure: torch only."""

from crosscal.statistics.factor import InverseFactor, factor
from crosscal.statistics.mixture import MeanSum, Mixture
from crosscal.statistics.moments import InputMoments, MomentsAccumulator
from crosscal.statistics.statistic import Statistic

__all__ = ["InputMoments", "InverseFactor", "MeanSum", "Mixture", "MomentsAccumulator", "Statistic", "factor"]
