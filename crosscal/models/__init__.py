"""Run any Hugging Face decoder block by block, and write compressed checkpoints of it."""

from crosscal.models.checkpoint import VariantWriter
from crosscal.models.export import Ints, packed_tensors, quantization_config
from crosscal.models.finding import find_matrices, find_sites
from crosscal.models.loading import load_variant
from crosscal.models.sites import LeftDense, Matrices, MatrixRef, Site, replaced_parameters
from crosscal.models.source import ModelSource
from crosscal.models.walk import BlockMoments, Upstream, WalkReport, walk

__all__ = [
    "BlockMoments",
    "Ints",
    "LeftDense",
    "Matrices",
    "MatrixRef",
    "ModelSource",
    "Site",
    "Upstream",
    "VariantWriter",
    "WalkReport",
    "find_matrices",
    "find_sites",
    "load_variant",
    "packed_tensors",
    "quantization_config",
    "replaced_parameters",
    "walk",
]
