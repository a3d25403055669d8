"""Calibration text: windows drawn from documents, written by the model itself, or random."""

from crosscal.calibration.generation import generate_windows, readable
from crosscal.calibration.quality import TextQuality, text_quality
from crosscal.calibration.sampling import TemperatureSchedule
from crosscal.calibration.sets import CalibrationSet, WindowRequest
from crosscal.calibration.tokens import tokenizer_digest
from crosscal.calibration.windows import draw_windows, random_windows

__all__ = [
    "CalibrationSet",
    "TemperatureSchedule",
    "TextQuality",
    "WindowRequest",
    "draw_windows",
    "generate_windows",
    "random_windows",
    "readable",
    "text_quality",
    "tokenizer_digest",
]
