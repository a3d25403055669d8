"""Package layout: which packages may import which, and rules for every file.

Imports point down only. `ROOMS` lists what each package of crosscal ("room") may import from crosscal and from other
distributions. Adding to it is a deliberate change of the design.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKS = {"flows", "tasks", "plans", "data", "deployment.yaml"}  # in crosscal/: symbolic links to the top level
FILES = sorted(
    file
    for top in ("crosscal", "flows", "tasks")
    for file in (ROOT / top).rglob("*.py")
    if top != "crosscal" or file.relative_to(ROOT).parts[1] not in LINKS
)
MOST_LINES = 300

EDGES = {"store", "corpora", "calibration", "models", "evaluation", "report"}
PURE = {"statistics", "compressors"}
ROOMS = {
    # room: (rooms it may import, distributions it may import besides the standard library)
    "errors": (set(), set()),
    "statistics": (
        {"errors", "compiled"},
        {"torch", "numpy", "numba", "threadpoolctl"},
    ),  # Numba locates BLAS's `syrk`; threadpoolctl limits it to one thread
    # numpy selects faster than torch on a CPU; Numba compiles loops there, Triton (which comes with torch) on a GPU
    "compressors": ({"errors", "compiled", "statistics"}, {"torch", "numpy", "triton"}),
    "progress": ({"errors"}, {"rich"}),
    "resources": (set(), set()),
    "compiled": (set(), {"numba"}),
    "lanes": (set(), {"torch"}),
    "store": (
        {"errors", "compiled", "files", "statistics"},
        {"torch", "numpy", "pyarrow", "fsspec", "tenacity"},
    ),
    "files": (set(), {"zstandard"}),
    "corpora": ({"errors", "files", "progress", "store"}, {"pyarrow", "datasets", "numpy"}),
    # MinHash and its index are datasketch's
    "selection": (
        {"errors", "files", "lanes", "progress", "store", "corpora"},
        {"pyarrow", "numpy", "datasketch"},
    ),
    "landing": ({"errors", "store", "corpora"}, {"fsspec", "tenacity"}),
    # evaluation: publication and report use one rule for whether models differ
    "publication": ({"errors", "store", "evaluation"}, set()),
    "usage": ({"errors", "store", "publication"}, set()),
    # jinja2: the errors of chat templates
    "calibration": (
        {"errors", "progress", "store", "corpora"},
        {"torch", "numpy", "pyarrow", "transformers", "jinja2"},
    ),
    "models": (
        {"errors", "files", "lanes", "statistics"},
        {"torch", "transformers", "safetensors", "huggingface_hub", "compressed_tensors", "numpy"},
    ),
    # calibration: cutting of windows; lanes: worker threads; scipy: Student's t; pyarrow: questions in Parquet;
    # rouge_score: summaries
    "evaluation": (
        {"errors", "files", "lanes", "progress", "calibration"},
        {"torch", "transformers", "lm_eval", "datasets", "tqdm", "numpy", "scipy", "pyarrow", "rouge_score"},
    ),
    "report": ({"errors", "files", "evaluation"}, {"matplotlib", "jinja2", "rich", "numpy"}),
    "plan": ({"errors", "files", "compressors", "resources"}, {"pydantic", "pydantic_core", "yaml"}),
    # prefect: which crons it can schedule
    "service": ({"errors"}, {"pydantic", "yaml", "prefect"}),
    "mixtures": ({"errors", "plan", "search", "statistics"}, set()),
    "search": (set(), {"numpy", "scipy"}),
    "variants": ({"errors", "plan", "mixtures", *PURE, "store"}, set()),
    "stages": (
        {"errors", "lanes", "progress", "mixtures", "search", "variants", *PURE, *EDGES},
        {"torch", "transformers", "numpy", "psutil"},
    ),
    "cli": (
        {
            *("errors", "progress", "resources", "plan", "service"),
            *("corpora", "selection", "store", "landing", "publication", "usage", "report", "flows"),
        },
        {"typer", "rich"},
    ),
    "__main__": ({"cli"}, set()),
    "warm_up": ({"statistics", "compressors", "store"}, {"torch"}),
    "__init__": ({"errors", "plan", "variants", *PURE, *EDGES}, set()),
}
ORCHESTRATED = {
    "tasks": {"prefect", "httpx", "torch"},
    "flows": {
        *("prefect", "prefect_dask", "dask", "distributed", "httpx", "pydantic", "yaml"),
        *("torch", "transformers", "psutil"),
    },
}


def imports(file: Path) -> Iterator[tuple[str, bool]]:
    """Yield (module, whether it is at the top of the file) of every import, also of those for type checkers only."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    tops = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in tops) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            for alias in node.names:
                # `from crosscal import errors` and `from crosscal.errors import X` both belong to the room `errors`
                yield (f"crosscal.{alias.name}" if node.module == "crosscal" else str(node.module)), id(node) in tops


def room_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "crosscal" else parts[0]


def target(module: str) -> tuple[str, bool]:
    """Return (room or distribution, whether it belongs to crosscal)."""
    top, *rest = module.split(".")
    if top == "crosscal":
        return (rest[0] if rest else "__init__"), True
    return top, False


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_down(file: Path) -> None:
    room = room_of(file)
    for module, _ in imports(file):
        name, is_ours = target(module)
        if room in ORCHESTRATED:
            assert name != "cli" or not is_ours
            assert (room, name) != ("tasks", "flows"), "tasks do not know the order of the steps"
            allowed = is_ours or name in ORCHESTRATED[room]
        elif is_ours:
            allowed = name == room or name in ROOMS[room][0]
        else:
            allowed = name in ROOMS[room][1]
        assert allowed or name in sys.stdlib_module_names, f"{room} may not import {module}"


def test_the_table_names_every_room() -> None:
    assert {room_of(file) for file in FILES} == set(ROOMS) | set(ORCHESTRATED)


def test_the_command_line_imports_the_flow_only_inside_its_commands() -> None:
    for file in (ROOT / "crosscal/cli").glob("*.py"):
        tops = {target(module)[0] for module, is_top in imports(file) if is_top}
        assert tops - set(sys.stdlib_module_names) <= {"typer", "errors", "resources", "cli"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_are_short(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) < MOST_LINES


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_is_unpickled_and_no_code_comes_with_a_model(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    modules = {module.split(".")[0] for module, _ in imports(file)}
    assert not modules & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        assert ast.unparse(call.func) not in ("torch.load", "torch.save", "eval", "exec"), f"line {call.lineno}"
        for keyword in call.keywords:
            if keyword.arg in ("trust_remote_code", "allow_pickle"):
                is_off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                assert is_off, f"line {call.lineno}: {keyword.arg}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_compressed_files_are_read_in_one_place(file: Path) -> None:
    """Code elsewhere might take a truncated stream for a complete shorter one."""
    decoders = {"gzip", "zlib", "bz2", "lzma", "zipfile", "tarfile", "zstandard"}
    assert room_of(file) == "files" or not decoders & {module.split(".")[0] for module, _ in imports(file)}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_error_is_swallowed_wholesale(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ExceptHandler) and not any(isinstance(part, ast.Raise) for part in ast.walk(node)):
            caught = ast.unparse(node.type) if node.type else ""
            assert caught not in ("", "Exception", "BaseException"), f"line {node.lineno}"
