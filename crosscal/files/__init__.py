"""Input files: format by name, decompression, decoding, and splitting into lines or JSON records.

Only this package opens compressed files, so that documents and questions are read alike. It also writes files that must
appear complete or not at all.
"""

from crosscal.files.broken import Broken, excerpt
from crosscal.files.json_records import JsonRecord, json_records
from crosscal.files.lines import Line, lines
from crosscal.files.names import COMPRESSIONS, FORMATS, JSON_FORMATS, distinct_stems, format_of, stem_of
from crosscal.files.whole import sync, whole_file, write_whole

__all__ = [
    "COMPRESSIONS",
    "FORMATS",
    "JSON_FORMATS",
    "Broken",
    "JsonRecord",
    "Line",
    "distinct_stems",
    "excerpt",
    "format_of",
    "json_records",
    "lines",
    "stem_of",
    "sync",
    "whole_file",
    "write_whole",
]
