"""Read selected tensors of a checkpoint, under the names of the modules that transformers builds from them.

A checkpoint may name or split its tensors differently from the modules: one tensor per expert where the module holds
all experts stacked, or an older name of a layer. transformers' own conversion rules are applied only to the requested
tensors, so that a block can be read without the rest of the model (see `naming.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import SkipParameters, WeightConverter, dot_natural_key, revert_weight_conversion
from transformers.utils.loading_report import LoadStateDictInfo

from crosscal.errors import ModelError
from crosscal.models.naming import Naming
from crosscal.models.tensor_files import AGAIN, Encoded, TensorReader, bytes_of, some_of

Wanted = Callable[[str], bool]
"""Predicate on a tensor's name in the model: whether it is requested."""


class Weights:
    """Tensors in safetensors files (`files`: checkpoint name -> file), under the names of `model`, on the meta device.

    `encoded`: checkpoint name -> tensor that is stored as parts; the parts then do not count as tensors of their own.
    """

    def __init__(
        self, files: Mapping[str, Path], model: PreTrainedModel, encoded: Mapping[str, Encoded] | None = None
    ) -> None:
        self.model, self.stored_in, self.encoded = model, files, encoded or {}
        parts = {part for each in self.encoded.values() for part in each.parts}
        plain = {key: file for key, file in files.items() if key not in parts}
        self.files = plain | {key: files[each.parts[0]] for key, each in self.encoded.items()}
        self._naming = Naming(model)
        self._expected = self._naming.expected
        self._sources, self.strays = self._match_names()
        self._tied = self._stored_once()

    def load(
        self, wanted: Wanted, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> dict[str, Tensor]:
        """Load every wanted tensor by its name in the model, in `dtype` or as stored. Raises `ModelError` for tensors
        that are missing, unexpected, of the wrong shape or unreadable."""
        strays = [name for name in self.strays if wanted(name)]
        if strays:
            raise ModelError("the checkpoint holds tensors that the model has no place for", got=some_of(strays))
        loaded: dict[str, Tensor] = {}
        with ExitStack() as stack:
            reader = TensorReader(self.stored_in, self.encoded, stack)

            def read(target: str) -> dict[str, Tensor]:
                kept_dtype = self._dtype_of(target, dtype)
                sources = self._sources[target]
                tensors = [(key, pattern, _moved(reader(key), kept_dtype, device)) for key, pattern in sources]
                return self._assemble(target, tensors)

            for target in filter(wanted, self._sources):
                loaded.update(read(target))
            for target, stored in self._tied.items():
                if wanted(target) and target not in loaded:
                    loaded[target] = loaded[stored] if stored in loaded else read(stored)[stored]
        self._check_complete(loaded, wanted)
        return loaded

    def check_names(self) -> None:
        """Raise `ModelError` if a tensor of the model is in no file, without reading any tensor."""
        held = {*self._sources, *self._tied}
        for target, sources in self._sources.items():
            rule = self._rule(sources[0][1])
            if rule is not None:  # one conversion may make several tensors
                first = rule.target_patterns[0]
                held |= {target.replace(first, other) for other in rule.target_patterns}
        self._check_missing(held, lambda name: True)

    def stored(self, keys: list[str]) -> dict[str, Tensor]:
        """Read tensors under their checkpoint names, without renaming or conversion (encoded ones are decoded)."""
        with ExitStack() as stack:
            reader = TensorReader(self.stored_in, self.encoded, stack)
            return {key: reader(key) for key in keys}

    def keys_of(self, wanted: Wanted) -> set[str]:
        """Return the checkpoint names of all wanted tensors of the model."""
        return {key for target, sources in self._sources.items() if wanted(target) for key, _ in sources}

    def in_checkpoint(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename and split tensors of the model as in the checkpoint: the inverse of `load`.

        `tensors` must contain everything that is converted together, for instance a whole block. Raises `ModelError`
        if transformers' own inverse conversion does not give the checkpoint's names.
        """
        plain = {target for target in tensors if self._sources.get(target) and not self.is_converted(target)}
        found = {key: tensors[target] for target in plain for key, _ in self._sources[target]}
        converted = {target: tensor for target, tensor in tensors.items() if target not in plain}
        reverted = revert_weight_conversion(self.model, converted)
        places: dict[tuple[str, str | None], list[str]] = {}
        for name in sorted(reverted, key=dot_natural_key):
            places.setdefault(self._naming.place(name), []).append(name)
        for (target, pattern), names in places.items():
            keys = [key for key, its_pattern in self._sources.get(target, ()) if its_pattern == pattern]
            if not keys and target in self._tied:
                continue  # written under the name that the checkpoint has
            if not keys or len(keys) != len(names):
                raise ModelError(
                    "this tensor cannot be written as the checkpoint stores it", where=target, got=f"{len(keys)} names"
                )
            found.update({key: reverted[name] for key, name in zip(keys, names, strict=True)})
        return found

    def target_of(self, key: str) -> str:
        """Return the name in the model of a checkpoint's tensor."""
        return self._naming.place(key)[0]

    def linear_of(self, target: str) -> str:
        """Return the checkpoint's name of the linear with weight `target`, or the model's name if the checkpoint does
        not store that weight as one unconverted tensor."""
        sources = self._sources.get(target, [])
        is_plain = len(sources) == 1 and sources[0][1] is None and sources[0][0].endswith(".weight")
        return (sources[0][0] if is_plain else target).removesuffix(".weight")

    def stacked_keys(self) -> set[str]:
        """Return the checkpoint names of the weights that the model holds in stacks: those of experts."""
        stacks = (target for target in self._sources if self._expected[target].ndim == 3)
        return {key for stack in stacks for key, pattern in self._sources[stack] if pattern and key.endswith(".weight")}

    def is_converted(self, target: str) -> bool:
        return target in self._sources and self._sources[target][0][1] is not None

    def split_stack(self, stack: str, tensor: Tensor) -> dict[str, Tensor]:
        """Split a stack of experts into the tensors of a checkpoint that stores experts one by one: name -> tensor."""
        (key, pattern), *_ = self._sources[stack]
        if pattern is not None:
            return self.in_checkpoint({stack: tensor})
        own, theirs = f"{stack.rpartition('.')[0]}.", f"{key.rpartition('.')[0]}."
        reverted = revert_weight_conversion(self.model, {stack: tensor})
        return {theirs + name.removeprefix(own) if name.startswith(own) else name: t for name, t in reverted.items()}

    def bytes_of(self, key: str) -> int:
        """Return the bytes of a tensor as stored or, if it is encoded, an upper bound of its decoded size."""
        return bytes_of(self.stored_in, self.encoded, key)

    def _match_names(self) -> tuple[dict[str, list[tuple[str, str | None]]], dict[str, str]]:
        """Return model name -> [(checkpoint name, conversion pattern)] in order, and name -> checkpoint name of tensors
        that the model does not contain."""
        sources: dict[str, list[tuple[str, str | None]]] = {}
        strays: dict[str, str] = {}
        for key in sorted(self.files, key=dot_natural_key):
            name, pattern = self._naming.place(key)
            if name in self._expected:
                sources.setdefault(name, []).append((key, pattern))
            else:
                strays[name] = key
        for tied, source in self.model.all_tied_weights_keys.items():  # stored under either name, or both
            if source in self._expected and source not in sources and tied in sources:
                sources[source] = sources[tied]
        info = _loading_info(unexpected=set(strays))
        self.model._adjust_missing_and_unexpected_keys(info)  # drops old rotary tables and masks, as loading does
        return sources, {name: strays[name] for name in strays if name in info.unexpected_keys}

    def _stored_once(self) -> dict[str, str]:
        """Return model name that the checkpoint lacks -> name of a tied parameter that it contains."""
        groups: dict[str, list[str]] = {}
        for name, other in self.model.all_tied_weights_keys.items():
            group = groups.setdefault(other, groups.get(name, [other]))
            group.append(name)
            groups[name] = group
        has = {name: next((other for other in group if other in self._sources), None) for name, group in groups.items()}
        return {name: other for name, other in has.items() if other is not None and name not in self._sources}

    def _assemble(self, target: str, tensors: list[tuple[str, str | None, Tensor]]) -> dict[str, Tensor]:
        if tensors[0][1] is None:
            return {target: tensors[-1][2]}
        rule = deepcopy(self._rule(tensors[0][1]))
        assert rule is not None
        for key, pattern, tensor in tensors:
            rule.add_tensor(target, key, str(pattern), cast(Any, tensor))  # accepts a tensor in place of a future
        info = _loading_info()
        try:
            made = rule.convert(target, model=self.model, config=self.model.config, loading_info=info)
        except SkipParameters:
            reason = info.conversion_errors.get(target, "").strip().splitlines()
            raise ModelError(
                "the checkpoint's tensors do not fit together", where=target, got="".join(reason[-2:-1])
            ) from None
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def _rule(self, pattern: str | None) -> WeightConverter | None:
        return next((rule for rule in self._naming.converters if pattern in rule.source_patterns), None)

    def _dtype_of(self, name: str, dtype: torch.dtype | None) -> torch.dtype | None:
        if dtype is None:
            return None
        kept = self.model._get_dtype_plan(dtype)  # modules that must compute in float32
        return next((kept[part] for part in kept if re.search(part.replace("*", ".*"), name)), dtype)

    def _check_complete(self, loaded: Mapping[str, Tensor], wanted: Wanted) -> None:
        self._check_missing(loaded, wanted)
        for name, tensor in loaded.items():
            if name not in self._expected or tensor.shape != self._expected[name].shape:
                due = tuple(self._expected[name].shape) if name in self._expected else "no such tensor"
                raise ModelError(
                    f"a tensor's shape does not fit the config, which says {due}",
                    where=name,
                    got=str(tuple(tensor.shape)),
                )

    def _check_missing(self, held: Collection[str], wanted: Wanted) -> None:
        tied = self.model.all_tied_weights_keys
        missing = {name for name in self._expected if wanted(name) and name not in held and name not in tied}
        info = _loading_info(missing=missing)
        self.model._adjust_missing_and_unexpected_keys(info)
        if info.missing_keys:
            names = some_of(sorted(info.missing_keys))
            raise ModelError("tensors are missing from the checkpoint", got=names, do=AGAIN)


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
