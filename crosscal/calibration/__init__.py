"""Calibration text: windows drawn from documents, written by the model itself, or random."""

from crosscal.calibration.continuing import Seeds, continued_windows
from crosscal.calibration.generation import generate_windows, readable
from crosscal.calibration.pool import Part, Pool, draw_pool
from crosscal.calibration.quality import TextQuality, faults, text_quality
from crosscal.calibration.sampling import TemperatureSchedule
from crosscal.calibration.sets import CalibrationSet, WindowRequest
from crosscal.calibration.tokens import tokenizer_digest
from crosscal.calibration.windows import random_windows

__all__ = [
    "CalibrationSet",
    "Part",
    "Pool",
    "Seeds",
    "TemperatureSchedule",
    "TextQuality",
    "WindowRequest",
    "continued_windows",
    "draw_pool",
    "faults",
    "generate_windows",
    "random_windows",
    "readable",
    "text_quality",
    "tokenizer_digest",
]
