"""What layers saw, from sums over tokens to a factored Hessian. Pure: torch only."""

from crosscal.statistics.factor import InverseFactor, factor
from crosscal.statistics.mixture import HessianSum, Mixture
from crosscal.statistics.moments import InputMoments, MomentsAccumulator

__all__ = ["HessianSum", "InputMoments", "InverseFactor", "Mixture", "MomentsAccumulator", "factor"]
