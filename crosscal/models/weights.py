"""Reads a few of a checkpoint's tensors, under the names of the modules that transformers builds from them.

A checkpoint may name or cut its tensors differently from the modules: one tensor per expert where the module holds
all experts stacked, an older spelling of a layer. transformers' own conversion rules are applied, to the tensors that
are asked for and no others, so that a block can be read without the rest of the model. (Some of what is imported for
that is not public in transformers; a release that moves it fails at import, not in silence.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    SkipParameters,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.utils.loading_report import LoadStateDictInfo

from crosscal.errors import ModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
AGAIN = "Download or save the model again."

Wanted = Callable[[str], bool]
"""Says of a module's tensor name whether it is asked for."""


class Weights:
    """Tensors in safetensors files (`files`: checkpoint name -> file), as `model`, on the meta device, names them."""

    def __init__(self, files: Mapping[str, Path], model: PreTrainedModel) -> None:
        self.files, self.model = files, model
        self._expected = model.state_dict()
        mapping = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
        self._sources, self.strays = self._match_names()

    def load(
        self, wanted: Wanted, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> dict[str, Tensor]:
        """Every wanted tensor, in `dtype` or as stored. Raises `ModelError` for missing, stray or unreadable ones."""
        strays = [name for name in self.strays if wanted(name)]
        if strays:
            raise ModelError("the checkpoint holds tensors that the model has no place for", got=_some(strays))
        loaded: dict[str, Tensor] = {}
        with ExitStack() as stack:
            reader = _Reader(self.files, stack)
            for target, sources in self._sources.items():
                if wanted(target):
                    kept_dtype = self._dtype_of(target, dtype)
                    tensors = [(key, pattern, _moved(reader(key), kept_dtype, device)) for key, pattern in sources]
                    loaded.update(self._assemble(target, tensors))
        self._check_complete(loaded, wanted)
        return loaded

    def stored(self, keys: list[str]) -> dict[str, Tensor]:
        """Tensors exactly as the checkpoint names and stores them."""
        with ExitStack() as stack:
            reader = _Reader(self.files, stack)
            return {key: reader(key) for key in keys}

    def keys_of(self, wanted: Wanted) -> set[str]:
        """The checkpoint's names of everything that is wanted and that the model has a place for."""
        return {key for target, sources in self._sources.items() if wanted(target) for key, _ in sources}

    def in_checkpoint(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the model under the names, and cut as, the checkpoint has them: the inverse of `load`.

        Everything that is converted together must be there together, for instance a whole block. Raises `ModelError`
        where transformers' own inverse does not lead back to the checkpoint's names.
        """
        reverted = revert_weight_conversion(self.model, dict(tensors))
        places: dict[tuple[str, str | None], list[str]] = {}
        for name in sorted(reverted, key=dot_natural_key):
            places.setdefault(self._place(name), []).append(name)
        found: dict[str, Tensor] = {}
        for (target, pattern), names in places.items():
            keys = [key for key, its_pattern in self._sources.get(target, ()) if its_pattern == pattern]
            if pattern is None and len(names) == 1:
                names *= len(keys)  # one tensor stored under several names
            if not keys or len(keys) != len(names):
                raise ModelError(
                    "this tensor cannot be written as the checkpoint stores it", where=target, got=f"{len(keys)} names"
                )
            found.update({key: reverted[name] for key, name in zip(keys, names, strict=True)})
        return found

    def target_of(self, key: str) -> str:
        """The model's name of a checkpoint's tensor that is not converted."""
        return self._place(key)[0]

    def key_of_part(self, target: str, part: str) -> str:
        """What a part that stands for `target` is called: `(x.weight, weight_packed)` -> `x.weight_packed`, `x` in
        the checkpoint's spelling if that leads back to the module, else in the model's own."""
        (key, pattern), *more = self._sources[target]
        theirs, own = _with_last(key, part), _with_last(target, part)
        is_plain = pattern is None and not more and key.endswith(".weight")
        return theirs if is_plain and self._renamed(theirs) == _with_last(self._renamed(key), part) else own

    def is_converted(self, target: str) -> bool:
        return self._sources[target][0][1] is not None

    def _renamed(self, key: str) -> str:
        return rename_source_key(key, self._renamings, self._converters)[0]

    def _place(self, key: str) -> tuple[str, str | None]:
        """(module name, conversion pattern) of a checkpoint name."""
        prefix = self.model.base_model_prefix
        name, pattern = rename_source_key(key, self._renamings, self._converters, prefix, self._expected)
        if name not in self._expected and key in self._expected:
            return key, None  # a rule meant for an older spelling matched a name that is already right
        return name, pattern

    def bytes_of(self, key: str) -> int:
        with _opened(self.files[key]) as file:
            view = file.get_slice(key)
            return int(torch.Size(view.get_shape()).numel()) * _ITEM_BYTES.get(view.get_dtype(), 8)

    def _match_names(self) -> tuple[dict[str, list[tuple[str, str | None]]], dict[str, str]]:
        """Module name -> (checkpoint name, conversion pattern), in order; of strays: module name -> checkpoint name."""
        sources: dict[str, list[tuple[str, str | None]]] = {}
        strays: dict[str, str] = {}
        for key in sorted(self.files, key=dot_natural_key):
            name, pattern = self._place(key)
            if name in self._expected:
                sources.setdefault(name, []).append((key, pattern))
            else:
                strays[name] = key
        info = _loading_info(unexpected=set(strays))
        self.model._adjust_missing_and_unexpected_keys(info)  # old rotary tables and masks, which loading leaves out
        return sources, {name: strays[name] for name in strays if name in info.unexpected_keys}

    def _assemble(self, target: str, tensors: list[tuple[str, str | None, Tensor]]) -> dict[str, Tensor]:
        if tensors[0][1] is None:
            return {target: tensors[-1][2]}
        rule = next(rule for rule in self._converters if tensors[0][1] in rule.source_patterns)
        rule = deepcopy(rule)
        for key, pattern, tensor in tensors:
            rule.add_tensor(target, key, str(pattern), cast(Any, tensor))  # a tensor may stand for its future
        info = _loading_info()
        try:
            made = rule.convert(target, model=self.model, config=self.model.config, loading_info=info)
        except SkipParameters:
            reason = info.conversion_errors.get(target, "").strip().splitlines()
            raise ModelError(
                "the checkpoint's tensors do not fit together", where=target, got="".join(reason[-2:-1])
            ) from None
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def _dtype_of(self, name: str, dtype: torch.dtype | None) -> torch.dtype | None:
        if dtype is None:
            return None
        kept = self.model._get_dtype_plan(dtype)  # modules that a family insists on computing in float32
        return next((kept[part] for part in kept if re.search(part.replace("*", ".*"), name)), dtype)

    def _check_complete(self, loaded: Mapping[str, Tensor], wanted: Wanted) -> None:
        tied = self.model.all_tied_weights_keys
        info = _loading_info(
            missing={name for name in self._expected if wanted(name) and name not in loaded and name not in tied}
        )
        self.model._adjust_missing_and_unexpected_keys(info)
        if info.missing_keys:
            raise ModelError(
                "tensors are missing from the checkpoint",
                got=_some(sorted(info.missing_keys)),
                do=AGAIN,
            )
        for name, tensor in loaded.items():
            if name not in self._expected or tensor.shape != self._expected[name].shape:
                due = tuple(self._expected[name].shape) if name in self._expected else "no such tensor"
                raise ModelError(
                    f"a tensor's shape does not fit the config, which says {due}",
                    where=name,
                    got=str(tuple(tensor.shape)),
                )


@contextmanager
def attached(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Put tensors into a module, such as one on the meta device; what it held before is back afterwards."""
    empty = module.state_dict()
    unknown = sorted(tensors.keys() - empty.keys())
    if unknown:
        raise ModelError(
            "these are not names of tensors of the module", where=type(module).__name__, got=_some(unknown)
        )
    module.load_state_dict(tensors, strict=False, assign=True)
    try:
        yield
    finally:
        module.load_state_dict({name: empty[name] for name in tensors}, strict=False, assign=True)


_ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


class _Reader:
    """Reads tensors of several files, each opened once."""

    def __init__(self, files: Mapping[str, Path], stack: ExitStack) -> None:
        self._files, self._stack, self._open = files, stack, {}

    def __call__(self, key: str) -> Tensor:
        file = self._files[key]
        if file not in self._open:
            self._open[file] = self._stack.enter_context(_opened(file))
        try:
            return self._open[file].get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise _unreadable(file, error) from error


@contextmanager
def _opened(file: Path) -> Iterator[safe_open]:
    try:
        # pread, not mmap: pages of a mapped file would count as memory in use.
        handle = safe_open(str(file), framework="pt", device="cpu", backend="pread")
    except (SafetensorError, OSError) as error:
        raise _unreadable(file, error) from error
    with handle as opened:
        yield opened


def _unreadable(file: Path, error: Exception) -> ModelError:
    return ModelError("this weight file cannot be read", where=str(file), got=str(error), do=AGAIN)


def files_by_tensor(folder: Path) -> dict[str, Path]:
    """Checkpoint name -> the file that holds it. Raises `ModelError` when a file is missing or damaged."""
    index = folder / INDEX
    names = sorted(set(_weight_map(index).values())) if index.is_file() else [SINGLE]
    files: dict[str, Path] = {}
    for name in names:
        if not (folder / name).is_file():
            raise ModelError("a weight file is missing", where=str(folder), got=f"no {name}", do=AGAIN)
        files.update(dict.fromkeys(tensor_names(folder / name), folder / name))
    if index.is_file():
        gone = sorted(set(_weight_map(index)) - set(files))
        if gone:
            raise ModelError("tensors that the index lists are in no file", where=str(index), got=_some(gone))
    return files


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError("the index of the weight files cannot be read", where=str(index), got=str(error)) from error


def tensor_names(file: Path) -> list[str]:
    """The checkpoint names in one file."""
    with _opened(file) as opened:
        return list(opened.keys())


def _moved(tensor: Tensor, dtype: torch.dtype | None, device: torch.device | str) -> Tensor:
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)


def _loading_info(missing: set[str] | None = None, unexpected: set[str] | None = None) -> LoadStateDictInfo:
    return LoadStateDictInfo(
        missing_keys=missing or set(),
        unexpected_keys=unexpected or set(),
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )


def _with_last(name: str, part: str) -> str:
    return f"{name.rpartition('.')[0]}.{part}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
