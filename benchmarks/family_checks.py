"""Black-box checks of one tiny model against plain transformers in float64.

Shapes: T tokens, O outputs, I inputs of a matrix.

The reference has no notion of sites, experts or families. It records every matrix product of a forward pass in which
one operand is (part of) a parameter of a block, and accumulates XᵀX of the other operand, the input.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from crosscal.errors import CrosscalError, UnsupportedModel
from crosscal.evaluation import perplexity
from crosscal.models.blocks import find_blocks
from crosscal.models.loading import load_variant
from crosscal.models.source import ModelSource
from crosscal.report.rows import LayerRow
from crosscal.stages.compress import compress_block, layer_rows, publish_variants
from crosscal.stages.left_dense import left_dense
from crosscal.store import Store
from tests.helpers.tiny_run import collect, run_context, sample, variant

LARGE = 16
"""A parameter is a matrix when two of its dimensions exceed this."""
DAMAGE = 2e-3
"""Tolerance of losses against the float64 reference, relative to the loss of an all-zero weight (output energy)."""
LIKELIHOOD = {"F32": 1e-4, "BF16": 5e-2}
"""Tolerance of perplexities, by the dtype of the stored scales, to which packed weights are rounded."""
WINDOWS, LENGTH = 40, 24
PRUNED = variant("half", "sparsegpt", {"general": 1.0}, sparsity=0.5, fallback="keep-dense")
QUANTIZED = variant("w4", "gptq", {"general": 1.0}, bits=4, group_size=None, fallback="keep-dense")
AUTO = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM")


@dataclass
class Findings:
    """Findings of one family in one size; None: not reached."""

    family: str
    size: str
    architecture: str = ""
    dtype: str = "F32"
    refused_by_check: str | None = None
    refused_by_run: str | None = None
    solved: int = 0
    left_dense: list[str] = field(default_factory=list)
    dense_share: float | None = None
    """Share of the parameters of all listed matrices that are left dense."""
    unaccounted: list[str] = field(default_factory=list)
    reference: str = ""
    worst_layer: str = ""
    worst_loss: float | None = None
    """Largest deviation of a matrix's loss from the reference's, relative to its output energy."""
    names_changed: list[str] = field(default_factory=list)
    leave_dense: list[str] = field(default_factory=list)
    """Patterns that the plan must list in `leave_dense`."""
    copied: list[str] = field(default_factory=list)
    loads: dict[str, str] = field(default_factory=dict)
    """Class -> missing, unexpected or mismatched keys; empty if none."""
    worst_perplexity: float | None = None
    packed_share: float | None = None
    packed_loads: dict[str, str] = field(default_factory=dict)
    packed_perplexity: float | None = None
    not_built: str | None = None
    """Why plain transformers cannot build the model."""
    failed: str | None = None
    """An exception other than `CrosscalError`."""

    @property
    def faults(self) -> list[str]:
        if self.failed:
            return [self.failed]
        if self.refused_by_check or self.refused_by_run:
            same = self.refused_by_check == self.refused_by_run
            return [] if same else [f"check: {self.refused_by_check}; run: {self.refused_by_run}"]
        found = [f"not accounted for: {', '.join(self.unaccounted[:3])}"] if self.unaccounted else []
        if self.worst_loss is not None and not self.worst_loss <= DAMAGE:
            found.append(f"the loss of {self.worst_layer} is off by {self.worst_loss:.1e}")
        found += [f"names: {', '.join(self.names_changed[:3])}"] if self.names_changed else []
        found += [f"{kind}: {problem}" for kind, problem in self.loads.items() if problem]
        found += [f"packed, {kind}: {problem}" for kind, problem in self.packed_loads.items() if problem]
        for name, off, most in (
            ("perplexity", self.worst_perplexity, LIKELIHOOD["F32"]),
            ("packed perplexity", self.packed_perplexity, LIKELIHOOD[self.dtype]),
        ):
            if off is not None and not off <= most:
                found.append(f"{name} is off by {off:.1e}")
        return found

    @property
    def runs(self) -> bool:
        return not (self.not_built or self.failed or self.refused_by_check or self.refused_by_run)


def examine(family: str, size: str, folder: Path, tokens: tuple[int, int] = (6, 70)) -> Findings:
    """Check, calibrate, compress and load a checkpoint; `tokens` is the range that ids are drawn from."""
    found = Findings(family, size)
    try:
        source = ModelSource.open(folder)
        context = _shop(source, folder.parent, tokens)
    except CrosscalError as error:
        found.refused_by_check = found.refused_by_run = str(error)
        return found
    found.architecture = (source.config.architectures or ("",))[0]
    try:
        found.leave_dense = _checked(source, context)
    except CrosscalError as error:
        found.refused_by_check = str(error)
    variants = [dataclasses.replace(each, leave_dense=tuple(found.leave_dense)) for each in (PRUNED, QUANTIZED)]
    try:
        for each in context.samples.values():
            collect(context.cached, source, each.sets)
        for block in range(source.blocks):
            compress_block(context, block, variants)
        pruned, packed = publish_variants(context, variants)
    except CrosscalError as error:
        found.refused_by_run = str(error)
        return found
    found.copied = source.uncalibrated
    found.dtype = "F32" if source.dtype == torch.float32 else "BF16"
    rows = layer_rows(context, variants)
    _account(found, source, pruned, [row for row in rows if row.variant == PRUNED.name], context)
    _compare_files(found, folder, pruned)
    _load_all(found.loads, pruned, folder)
    _load_all(found.packed_loads, packed, folder)
    test_SL = _windows(8, 9, tokens)
    found.worst_perplexity = _perplexity_off(pruned, source, test_SL)
    found.packed_share = _packed_share(packed, source)
    if not any(found.packed_loads.values()):
        found.packed_perplexity = _perplexity_off(packed, source, test_SL)
    return found


def _checked(source: ModelSource, context: Any) -> list[str]:
    """Return the `leave_dense` patterns that the check requests; raises unless it passes with them."""
    try:
        left_dense(source, context.cached)
        return []
    except UnsupportedModel as error:
        asked = re.search(r"leave_dense: (\[.*?\])", error.do)
        if asked is None:
            raise
    patterns = json.loads(asked[1])
    left_dense(source, context.cached, patterns)
    return patterns


def _shop(source: ModelSource, folder: Path, tokens: tuple[int, int]) -> Any:
    store = Store(folder / "home")
    return run_context(folder / "run", store, source, sample(store, "general", _windows(WINDOWS + 2, 1, tokens)))


def _windows(count: int, seed: int, tokens: tuple[int, int]) -> Tensor:
    return torch.randint(*tokens, (count, LENGTH), generator=torch.Generator().manual_seed(seed))


class Products(TorchDispatchMode):
    """While active, record every product with a matrix of the given parameters: (parameter, offset) -> XᵀX and T."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {tensor.untyped_storage().data_ptr(): name for name, tensor in parameters.items()}
        self.grams: dict[tuple[str, int], Tensor] = {}
        self.tokens: dict[tuple[str, int], int] = {}
        self.is_stored_IO: dict[tuple[str, int], bool] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm", "linear", "mv", "addmv"):
            left, right = args[-2:] if name != "linear" else args[:2]
            if name == "linear":
                self._note(right, left, is_left=True)  # x_TI, weight_OI
            else:
                self._note(right, left, is_left=False)
                self._note(left, right.mT if right.ndim > 1 else right[None], is_left=True)
        return func(*args, **(kwargs or {}))

    def _note(self, matrix: Tensor, input_TI: Tensor, *, is_left: bool) -> None:
        name = self._names.get(matrix.untyped_storage().data_ptr())
        if name is None or matrix.ndim < 2:
            return
        stacks = range(matrix.shape[0]) if matrix.ndim == 3 else [None]
        for place in stacks:
            each = input_TI if place is None else input_TI[place]
            rows_TI = each.detach().reshape(-1, each.shape[-1]).double()
            key = (name, matrix.storage_offset() + (place or 0) * (matrix.stride(0) if matrix.ndim == 3 else 0))
            self.grams[key] = self.grams.get(key, 0) + rows_TI.mT @ rows_TI
            self.is_stored_IO[key] = (matrix.stride(-1) == 1) != is_left
            self.tokens[key] = self.tokens.get(key, 0) + len(rows_TI)


def _account(found: Findings, source: ModelSource, pruned: Path, rows: Sequence[LayerRow], context: Any) -> None:
    """Check that every matrix of every block has a row whose loss is that of the written weights on plain inputs."""
    kind = type(source.weights.model)
    for dtype in (torch.float64, torch.float32):  # some transformers code always computes in float32
        found.unaccounted, found.reference = [], str(dtype).removeprefix("torch.")
        with contextlib.suppress(RuntimeError):
            _reference(found, kind, dtype, source, pruned, rows, context)
            if not found.unaccounted and found.worst_loss is not None and found.worst_loss <= DAMAGE:
                return


def _reference(
    found: Findings,
    kind: Any,
    dtype: torch.dtype,
    source: ModelSource,
    pruned: Path,
    rows: Sequence[LayerRow],
    context: Any,
) -> None:
    before, after = (_plain(kind, folder, dtype) for folder in (source.path, pruned))
    prefix = f"{find_blocks(before)[0]}."
    parameters = {name: tensor for name, tensor in before.named_parameters() if name.startswith(prefix)}
    changed = dict(after.named_parameters())
    (drawn,) = context.samples.values()
    tokens_SL = torch.cat([_stored(context, key) for key in (part.key for part in drawn.calibration.parts)])
    with torch.no_grad(), Products(parameters) as seen:
        before(input_ids=tokens_SL, use_cache=False)
    due = {row.layer: row for row in rows}
    found.left_dense = sorted({f"{_inside(n, prefix)}: {r.fallback}" for n, r in due.items() if r.fallback})
    found.solved = sum(not row.fallback for row in rows)
    dense = sum(row.parameters or 0 for row in rows if row.fallback)
    found.dense_share = dense / max(1, sum(row.parameters or 0 for row in rows))
    for name, tensor in parameters.items():
        if tensor.ndim > 1 and sorted(tensor.shape)[-2] > LARGE:
            found.unaccounted += _without_row(name, tensor, due)
    worst = 0.0
    for name, row in due.items():
        if row.fallback or row.loss is None:
            continue
        parameter, place = _place(name, parameters)
        tensor, new = (each[parameter].detach() for each in (parameters, changed))
        if place is not None and tensor.ndim == 2:  # experts stacked along the rows
            count = 1 + max(int(other.rsplit(".", 2)[1]) for other in due if _place(other, parameters)[0] == parameter)
            tensor, new = (each.unflatten(0, (count, -1)) for each in (tensor, new))
        offset = 0 if place is None else place * tensor.stride(0)
        gram_II = seen.grams.get((parameter, offset))
        if gram_II is None:
            found.unaccounted.append(f"{name} (never multiplied)")
            continue
        delta, whole = (x.double() if place is None else x[place].double() for x in (tensor - new, tensor))
        if seen.is_stored_IO[parameter, offset]:
            delta, whole = delta.mT, whole.mT
        loss, energy = (float(((x @ gram_II) * x).sum()) / max(1, row.tokens) for x in (delta, whole))
        off = abs(loss - row.loss) / energy if energy else 0.0
        if off >= worst:
            worst, found.worst_layer = off, name
    found.worst_loss = worst


def _place(layer: str, parameters: Mapping[str, Tensor]) -> tuple[str, int | None]:
    """Return the parameter of a row's layer and its index in a stack."""
    for name in (f"{layer}.weight", layer):
        if name in parameters:
            return name, 0 if parameters[name].ndim == 3 else None
    stack, expert, part = layer.rsplit(".", 2)
    return f"{stack}.{part}" if f"{stack}.{part}" in parameters else f"{stack}.{part}.weight", int(expert)


def _without_row(name: str, tensor: Tensor, due: Mapping[str, LayerRow]) -> list[str]:
    owner, _, part = name.rpartition(".")
    if {name, name.removesuffix(".weight")} & due.keys():
        return []
    stack, _, kind = owner.rpartition(".")
    for prefix, suffix in ((owner, part), (stack, kind) if part == "weight" else (owner, part)):
        if all(f"{prefix}.{expert}.{suffix}" in due for expert in range(tensor.shape[0] if tensor.ndim == 3 else 2)):
            return []
    return [] if part.endswith("_bias") else [name]


def _inside(name: str, prefix: str) -> str:
    return name.removeprefix(prefix).partition(".")[2]


def _stored(context: Any, key: str) -> Tensor:
    from crosscal.calibration.sets import windows_by_key

    return windows_by_key(context.cached.store, key)


def _plain(kind: Any, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    return kind.from_pretrained(folder, dtype=dtype, experts_implementation="eager").eval()


def _compare_files(found: Findings, source: Path, written: Path) -> None:
    """Check that names and dtypes of a pruned folder are those of the source."""
    before, after = (_dtypes(folder) for folder in (source, written))
    found.names_changed = [
        f"{name} ({before.get(name, 'new')} -> {after.get(name, 'gone')})"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def _dtypes(folder: Path) -> dict[str, str]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found |= {key: opened.get_slice(key).get_dtype() for key in opened.keys()}  # noqa: SIM118
    return found


def classes(config: PretrainedConfig) -> Iterator[Any]:
    """Yield the Auto classes that map to the classes in a config's `architectures`, or those classes themselves."""
    for name in config.architectures or ():
        autos = [getattr(transformers, auto) for auto in AUTO]
        fit = [a for a in autos if type(config) in a._model_mapping and a._model_mapping[type(config)].__name__ == name]
        yield from fit or [getattr(transformers, name)]


def _load_all(found: dict[str, str], folder: Path, source: Path) -> None:
    """Check that the folder loads in every class with no missing or unexpected keys beyond the source's."""
    config = transformers.AutoConfig.from_pretrained(source)
    for kind in classes(config):
        try:
            _, report = kind.from_pretrained(folder, output_loading_info=True)
            problems = ("missing_keys", "unexpected_keys", "mismatched_keys")
            before = dict.fromkeys(problems, ())
            if any(report[problem] for problem in problems):
                _, before = kind.from_pretrained(source, output_loading_info=True)
        except Exception as error:  # a user would see whatever transformers raises
            found[kind.__name__] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            raise_if_ours(error)
            continue
        odd = [
            f"{problem} {', '.join(sorted(map(str, set(report[problem]) - set(before[problem])))[:3])}"
            for problem in problems
            if set(report[problem]) - set(before[problem])
        ]
        found[kind.__name__] = "; ".join(odd)


def raise_if_ours(error: Exception) -> None:
    if isinstance(error, AssertionError | KeyboardInterrupt):
        raise error


def _perplexity_off(folder: Path, source: ModelSource, tokens_SL: Tensor) -> float:
    """Return |log(perplexity reported by crosscal / perplexity of the plain logits)|, in float32."""
    reported = perplexity(
        load_variant(folder, dtype=torch.float32), tokens_SL, name="general", split="test", device="cpu"
    )
    kind = transformers.AutoModelForCausalLM if type(source.config) in _CAUSAL else next(classes(source.config))
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = cast(Any, model)(input_ids=tokens_SL, use_cache=False).logits[:, :-1].double()
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens_SL[:, 1:].flatten())
    return abs(math.log(reported.value) - float(nll))


_CAUSAL = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING


def _packed_share(folder: Path, source: ModelSource) -> float:
    """Return the share of the parameters of the blocks' matrices that is written packed."""
    packed = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            keys = [key for key in opened.keys() if key.endswith("weight_shape")]  # noqa: SIM118
            shapes = [opened.get_tensor(key) for key in keys]
            packed += sum(int(shape.prod()) for shape in shapes)
    blocks = find_blocks(source.weights.model)[1]
    whole = sum(p.numel() for p in blocks.parameters() if p.ndim > 1)
    return packed / whole if whole else 0.0


def as_json(found: Findings) -> dict[str, Any]:
    return json.loads(json.dumps({**asdict(found), "runs": found.runs, "faults": found.faults}, default=str))
