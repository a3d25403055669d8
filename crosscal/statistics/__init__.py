"""What layers saw, from sums over tokens to a factored Hessian. Pure: torch only."""

from crosscal.statistics.factor import HessianFactor, factor
from crosscal.statistics.mixture import Mixture
from crosscal.statistics.moments import InputMoments, MomentsAccumulator

__all__ = ["HessianFactor", "InputMoments", "Mixture", "MomentsAccumulator", "factor"]
