"""The model to calibrate, from a local directory or a hub id: its config, digest and weights, read block by block."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Collection
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, overload

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from crosscal.errors import ModelError
from crosscal.models.blocks import MODEL_ERRORS, find_blocks
from crosscal.models.building import build_skeleton, causal_class
from crosscal.models.encoded import ENCODINGS, encoded_tensors, encoding_of, without_unused
from crosscal.models.export import dense_linears
from crosscal.models.packing import Packing, linears_needed_by_init
from crosscal.models.tensor_files import ADAPTER, ADAPTER_CONFIG, AGAIN, INDEX, SINGLE, files_by_tensor
from crosscal.models.weights import Weights

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
_HUB_DUPLICATES = ["consolidated*", "original/*", "onnx/*"]
_POSITIONS = ("max_position_embeddings", "max_seq_len", "max_target_positions", "n_positions")
_COMPUTED = re.compile(r"\.(inv_freq|position_ids|masked_bias|attn\.bias|attention\.bias)$")
"""Buffers that older versions of transformers stored and that models now compute."""


T = TypeVar("T")


class _shared_property(cached_property[T]):
    """Computed once even with concurrent access from several threads, which `cached_property` does not guarantee."""

    @overload
    def __get__(self, instance: None, owner: type[Any] | None = None) -> _shared_property[T]: ...
    @overload
    def __get__(self, instance: Any, owner: type[Any] | None = None) -> T: ...
    def __get__(self, instance: Any, owner: type[Any] | None = None) -> Any:
        if instance is None:
            return self
        with instance._computing:
            return super().__get__(instance, owner)


class ModelSource:
    """A safetensors checkpoint and the architecture that its config names. None of it is executed or unpickled.

    Thread-safe: derived values are computed once and only read afterwards.
    """

    def __init__(self, path: Path, config: PretrainedConfig, revision: str | None = None) -> None:
        self.path, self.config, self.revision = path, config, revision
        self._quantization = _take_encoding(config)
        self._computing = threading.RLock()

    @classmethod
    def open(cls, path_or_hub_id: str | Path, revision: str | None = None) -> ModelSource:
        """Open a local directory, or download the model from the hub if necessary. Raises `ModelError`."""
        path = _local_directory(str(path_or_hub_id), revision)
        if not (path / "config.json").is_file():
            raise ModelError("this is not a model directory", where=str(path), got="no config.json")
        config = _read_config(path)
        if not any((path / name).is_file() for name in (INDEX, SINGLE)):
            pickled = any(path.glob("*.bin")) or any(path.glob("*.pt"))
            raise ModelError(
                "pickled weights are never read" if pickled else "the directory holds no weights",
                where=str(path),
                got=f"neither {INDEX} nor {SINGLE}",
                do="Convert the model to safetensors first." if pickled else AGAIN,
            )
        if (path / ADAPTER / ADAPTER_CONFIG).is_file():
            raise ModelError(
                "the model has low-rank parts beside its weights, which would be left out",
                where=str(path / ADAPTER),
                do="Give the model that it was made from.",
            )
        return cls(path, config, revision)

    @_shared_property
    def digest(self) -> str:
        """sha256 over config.json and the content of every weight file, independent of file and folder names."""
        files = [self.path / "config.json", *sorted(set(self.weights.stored_in.values()))]
        digests = []
        for file in files:
            with file.open("rb") as stream:
                digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
        return hashlib.sha256(json.dumps([digests[0], sorted(digests[1:])]).encode()).hexdigest()

    @_shared_property
    def dtype(self) -> torch.dtype:
        """The dtype the checkpoint is stored in: that of the config, or else of the first floating-point tensor."""
        if isinstance(self.config.dtype, torch.dtype):
            return self.config.dtype
        tensors = (next(iter(self.weights.stored([key]).values())) for key in self.weights.files)
        return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)

    @_shared_property
    def weights(self) -> Weights:
        """The checkpoint's tensors. `weights.model` is a shared skeleton: use it for names and shapes only."""
        files, encoded = files_by_tensor(self.path), {}
        if self._quantization is not None:
            files = without_unused(files)
            encoded = encoded_tensors(files, self._quantization, self.dtype)
        return Weights(files, self.skeleton(), encoded)

    @_shared_property
    def parameters(self) -> int:
        """Number of parameters of the whole model, tied ones counted once."""
        model = self.weights.model
        return sum(p.numel() for name, p in model.named_parameters() if name not in model.all_tied_weights_keys)

    @property
    def encoding(self) -> str | None:
        """Description of the matrices' encoding if they are decoded while being read, otherwise None."""
        encoding = encoding_of(self._quantization)
        return encoding and f"{encoding}, {ENCODINGS[encoding]}"

    @_shared_property
    def loaded_as(self) -> Weights:
        """The checkpoint's tensors as named by the class in the config's `architectures`: for a multimodal model the
        wrapper, not the calibrated language model inside it."""
        names = self.config.architectures or ()
        kind = next((found for name in names if (found := getattr(transformers, name, None)) is not None), None)
        if kind is None or kind is causal_class(self.config):
            return self.weights
        return Weights(self.weights.stored_in, self._built(kind, torch.float32), self.weights.encoded)

    def name_when_loaded(self, name: str) -> str:
        """Return the name that the class in the config's `architectures` gives to a tensor of the calibrated model."""
        return self.loaded_as.target_of(min(self.weights.keys_of(lambda target: target == name)))

    def linears_besides(self, packed: Collection[str]) -> set[str]:
        """Return every linear and router that is not in `packed` (checkpoint names of weights), under all names that a
        loader may use: those of both classes (`weights`, `loaded_as`) and of the checkpoint."""
        found: set[str] = set()
        for weights in dict.fromkeys((self.weights, self.loaded_as)):
            names = dense_linears(weights.model, [weights.target_of(key).removesuffix(".weight") for key in packed])
            found |= {spelled for name in names for spelled in (name, weights.linear_of(f"{name}.weight"))}
        return found | {key.removesuffix(".weight") for key in self.weights.stacked_keys() - set(packed)}

    @_shared_property
    def packing(self) -> Packing:
        """Determines which matrices can be stored packed."""
        kinds = {type(weights.model) for weights in (self.weights, self.loaded_as)}
        touched = [linears_needed_by_init(self._built(kind, torch.float32)) for kind in kinds]
        return Packing(self.weights, self.loaded_as, set().union(*touched))

    @property
    def uncalibrated(self) -> list[str]:
        """Parts of the checkpoint that the calibrated model does not contain (vision tower, `mtp.*`, further layers),
        e.g. `mtp (15 tensors)`. They are copied unchanged."""
        placed = self.weights.keys_of(lambda name: True)
        counts = Counter(_part_of(key) for key in self.weights.files if key not in placed and not _COMPUTED.search(key))
        return [f"{part} ({count} tensor{'s' if count > 1 else ''})" for part, count in sorted(counts.items())]

    @_shared_property
    def blocks(self) -> int:
        """Number of decoder blocks."""
        return len(find_blocks(self.weights.model)[1])

    @property
    def max_positions(self) -> int | None:
        """The longest window that the config allows, or None if it states no limit."""
        config = self.config.get_text_config()
        said = [getattr(config, name, None) for name in _POSITIONS]
        return next((positions for positions in said if isinstance(positions, int) and positions > 0), None)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        try:
            return AutoTokenizer.from_pretrained(self.path, trust_remote_code=False, local_files_only=True)
        except (OSError, *MODEL_ERRORS) as error:
            raise ModelError(
                "the model's tokenizer cannot be loaded", where=str(self.path), got=_first_line(error)
            ) from error

    def skeleton(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """Return the model with all parameters on the meta device; computed buffers (rotary tables) are real."""
        return self._built(causal_class(self.config), dtype)

    def _built(self, kind: type[PreTrainedModel], dtype: torch.dtype) -> PreTrainedModel:
        try:
            return build_skeleton(deepcopy(self.config), kind, dtype)
        except MODEL_ERRORS as error:
            raise ModelError(
                f"no {kind.__name__} can be built from the config", where=str(self.path), got=_first_line(error)
            ) from error

    def block_name(self, block: int) -> str:
        """E.g. `model.layers.3`."""
        return f"{self._blocks_name}.{block}"

    def load_block(
        self, block: int, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> dict[str, Tensor]:
        """Load one block's tensors: name inside the block -> tensor, in `dtype` or as stored."""
        prefix = f"{self.block_name(block)}."
        tensors = self.weights.load(lambda name: name.startswith(prefix), dtype=dtype, device=device)
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}

    def tied_in_block(self, block: int) -> set[str]:
        """Names inside the block of parameters that are tied to another one, in the block or elsewhere in the model."""
        named = list(self.weights.model.named_parameters(remove_duplicate=False))
        counts, prefix = Counter(id(parameter) for _, parameter in named), f"{self.block_name(block)}."
        return {name.removeprefix(prefix) for name, p in named if name.startswith(prefix) and counts[id(p)] > 1}

    def load_outside(
        self, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", with_head: bool = False
    ) -> dict[str, Tensor]:
        """Load what runs before the blocks (embeddings) and after them (norm), by default without the output head.

        Tensors outside the blocks that the model does not contain, such as another head, are skipped.
        """
        model = self.weights.model
        head = model.get_output_embeddings()
        heads = tuple(f"{name}." for name, module in model.named_modules() if module is head and not with_head)

        def wanted(name: str) -> bool:
            return self.is_outside(name) and not name.startswith(heads) and name not in self.weights.strays

        tensors = self.weights.load(wanted, dtype=dtype, device=device)
        tied = model.all_tied_weights_keys if with_head else {}
        shared = {name: tensors[other] for name, other in tied.items() if name not in tensors and other in tensors}
        return tensors | shared

    def is_outside(self, name: str) -> bool:
        """Whether a tensor of the model belongs to no block."""
        return not name.startswith(f"{self._blocks_name}.")

    @_shared_property
    def _blocks_name(self) -> str:
        return find_blocks(self.weights.model)[0]


def _part_of(key: str) -> str:
    """`model.layers.61.mlp.up_proj.weight` -> `model.layers.61`, `model.visual.blocks.0.norm` -> `model.visual`."""
    return m[0] if (m := re.match(r"(model\.)?layers\.\d+|model\.[^.]+|[^.]+", key)) else key


def _local_directory(name: str, revision: str | None) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not _HUB_ID.fullmatch(name):
        raise ModelError("no such model directory", where=name, do="Give a directory or a hub id such as `owner/name`.")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_DUPLICATES
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise ModelError(
            "neither a directory here nor a model that the hub could give",
            where=name,
            got=_first_line(error),
            do="Check the spelling, the revision and the network, or give a directory.",
        ) from error


def _read_config(path: Path) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (OSError, *MODEL_ERRORS) as error:
        raise ModelError("the model's config cannot be read", where=str(path), got=_first_line(error)) from error
    quantization: Any = getattr(config, "quantization_config", None)
    if quantization and encoding_of(quantization) is None:
        got = str(quantization.get("quant_method"))
        raise ModelError(
            "the model is already quantized", where=str(path), got=got, do="Give the unquantized checkpoint."
        )
    return config


def _take_encoding(config: PretrainedConfig) -> dict[str, Any] | None:
    """Remove and return the config's `quantization_config`, so that it describes the decoded model."""
    quantization = vars(config).pop("quantization_config", None)
    if quantization is None:
        return None
    if not isinstance(config.dtype, torch.dtype):
        config.dtype = torch.bfloat16
    return dict(quantization)


def _first_line(error: Exception) -> str:
    if isinstance(error, StrictDataclassError):  # its first line only states that a check failed
        return " ".join(str(error).split())
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
