"""Package layout: which packages may import which, and rules for every file.

Imports point down only. `ROOMS` lists what each package of crosscal ("room") may import from crosscal and from other
distributions. Adding to it is a deliberate change of the design.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

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


@functools.cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file.relative_to(ROOT)))


def calls(file: Path) -> Iterator[ast.Call]:
    return (node for node in ast.walk(parsed(file)) if isinstance(node, ast.Call))


def imports(file: Path) -> Iterator[tuple[str, bool]]:
    """Yield (module, whether it is at the top of the file) of every import, also of those for type checkers only."""
    tree = parsed(file)
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


def may_import(room: str, module: str) -> bool:
    name, is_ours = target(module)
    if room in ORCHESTRATED:
        # tasks do not know the order of the steps
        forbidden = is_ours and (name == "cli" or (room, name) == ("tasks", "flows"))
        allowed = not forbidden and (is_ours or name in ORCHESTRATED[room])
    elif is_ours:
        allowed = name == room or name in ROOMS[room][0]
    else:
        allowed = name in ROOMS[room][1]
    return allowed or (not is_ours and name in sys.stdlib_module_names)


def test_imports_point_down() -> None:
    pairs = [(file, module) for file in FILES for module, _ in imports(file)]
    assert [f"{file}: {module}" for file, module in pairs if not may_import(room_of(file), module)] == []


def test_the_table_names_every_room() -> None:
    assert {room_of(file) for file in FILES} == set(ROOMS) | set(ORCHESTRATED)


def test_the_command_line_imports_the_flow_only_inside_its_commands() -> None:
    for file in (ROOT / "crosscal/cli").glob("*.py"):
        tops = {target(module)[0] for module, is_top in imports(file) if is_top}
        assert tops - set(sys.stdlib_module_names) <= {"typer", "errors", "resources", "cli"}


def test_files_are_short() -> None:
    lines = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert {file: count for file, count in lines.items() if count >= MOST_LINES} == {}


def test_nothing_is_unpickled_and_no_code_comes_with_a_model() -> None:
    unpicklers = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    assert [file for file in FILES if unpicklers & {module.split(".")[0] for module, _ in imports(file)}] == []
    for file in FILES:
        for call in calls(file):
            where = f"{file}, line {call.lineno}"
            assert ast.unparse(call.func) not in ("torch.load", "torch.save", "eval", "exec"), where
            for keyword in call.keywords:
                if keyword.arg in ("trust_remote_code", "allow_pickle"):
                    is_off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                    assert is_off, f"{where}: {keyword.arg}"


def test_compressed_files_are_read_in_one_place() -> None:
    """Code elsewhere might take a truncated stream for a complete shorter one."""
    decoders = {"gzip", "zlib", "bz2", "lzma", "zipfile", "tarfile", "zstandard"}
    found = [file for file in FILES if decoders & {module.split(".")[0] for module, _ in imports(file)}]
    assert {room_of(file) for file in found} == {"files"}


def test_no_error_is_swallowed_wholesale() -> None:
    for file in FILES:
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.ExceptHandler) and not any(isinstance(part, ast.Raise) for part in ast.walk(node)):
                caught = ast.unparse(node.type) if node.type else ""
                assert caught not in ("", "Exception", "BaseException"), f"{file}, line {node.lineno}"
