"""Claim: one variant, and above all a sweep, takes a fraction of llm-compressor's time, at no larger error.

    python benchmarks/vs_peers.py [--testbed TESTBED] [--cases random testbed] [--repeats 3] [--methods …] [--tiny]

llm-compressor runs in a separate environment that this script makes under the user's cache folder. Both sides get the
same weights and the same windows, run in separate processes, alternating, with the same number of threads; a third
process evaluates all models (`peers/evaluate.py`). Times run from the weights on disk to the compressed model on disk,
without imports. crosscal also runs held-out windows (an eighth as many, a plan's default share) and measures every
layer on them, which the peer does not; a further run has only one of them. SparseGPT at 50 % is repeated, the other
methods run once; each ratio is taken within one repeat, and the rows are medians, with half ranges as spread. The
peer's time for a sweep is its measured time for one variant times the number of variants. crosscal's refined solvers
are also compared with the peer's SparseGPT, since it has none. Results of cases and methods left out are kept.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
import venv
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from records import cpu_model, load_average, median_record, record, write

VERSION = "0.14.0.1"
PACKAGES = ("torch==2.13.0", f"llmcompressor=={VERSION}")
HERE = Path(__file__).parent / "peers"
METHODS: dict[str, dict[str, Any]] = {
    "sparsegpt": {"method": "sparsegpt", "sparsity": 0.5},
    "sparsegpt-2:4": {"method": "sparsegpt", "sparsity": "2:4"},
    "gptq": {"method": "gptq", "bits": 4, "activation_order": True},
    "wanda": {"method": "wanda", "sparsity": 0.5},
}
PRUNERS = {
    "crosscal dense": [{"method": "sparsegpt"}],
    "crosscal dense, sparsegpt + refit": [{"method": "sparsegpt"}, {"method": "refit"}],
    "crosscal dense, alps": [{"method": "alps"}],
}
"""Recipes compared with the peer's SparseGPT; the first has the peer's steps, the others refine them."""
REFINED = list(PRUNERS)[1:]
ONE_MORE = {"label": "one more sparsity", "compress": [{"method": "sparsegpt", "sparsity": 0.55}]}
EIGHT_MORE = {
    "label": "eight more sparsities",
    "compress": [{"method": "sparsegpt", "sparsity": [0.3, 0.35, 0.4, 0.45, 0.6, 0.65, 0.7, 0.75]}],
}
SWEEP = {"domain": "biomedical", "alpha": [0.25, 0.75]}
SWEEP_SPARSITIES = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, "2:4", "4:8"]
SWEEP_VARIANTS = 16
CLAIMED = "sparsegpt"
"""The method that the claim is about, which is repeated; the others run once."""
PEER = "llm-compressor"
SAME_DATA = "crosscal dense, one held-out window"
"""The minimum of a plan, so that both sides run almost the same windows."""
Answer = dict[str, Any]


def recipe(pruner: str, sparsity: Any, more: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return a plan entry: one of `PRUNERS` at one or several sparsities."""
    first, *others = PRUNERS[pruner]
    return {"steps": [first | {"sparsity": sparsity}, *others], **(more or {})}


@functools.cache
def peer_python() -> Path:
    """Return the interpreter of the peer's environment, which is made on the first call."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / "crosscal-benchmarks" / f"llmcompressor-{VERSION}"
    python = folder / "bin" / "python"
    if not python.is_file():
        venv.create(folder, with_pip=True)
    if subprocess.run([python, "-c", "import llmcompressor"], capture_output=True).returncode:
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    return python


@dataclass(frozen=True)
class Contest:
    """One case, with methods that start its processes."""

    case: Any
    folder: Path
    threads: int

    def models(self, method: str) -> dict[str, Path]:
        names = (PEER, "crosscal dense", "crosscal sequential", *(REFINED if method == CLAIMED else ()))
        return {name: self.folder / f"{method.replace(':', 'of')} {name}" for name in names}

    def call(self, python: str | Path, script: str, **job: Any) -> Answer:
        files = {"model": str(self.case.model), "windows": str(self.case.windows)}
        argument = json.dumps({**files, "threads": self.threads, "group_size": self.case.group_size, **job})
        variables = {"OMP_NUM_THREADS": str(self.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(
            [python, str(HERE / script), argument],
            env={**os.environ, "PYTHONPATH": str(HERE.parent.parent), **variables},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{script} failed on {argument}\n{done.stderr[-4000:]}")
        return json.loads(done.stdout.splitlines()[-1])

    def peer(self, method: str, out: Path) -> Answer:
        return self.call(peer_python(), "run_llmcompressor.py", method=method, out=str(out), batch_size=1)

    def own(
        self,
        compress: list[dict[str, Any]],
        corpora: list[str],
        out: Path | None,
        again: list[Any],
        held_out: int | None = None,
    ) -> Answer:
        job = {"compress": compress, "corpora": corpora, "again": again, "out": str(out) if out else None}
        job["held_out"] = held_out
        return self.call(sys.executable, "run_crosscal.py", **job)

    def one_variant(self, method: str, repeat: int) -> dict[str, Answer]:
        """Run every contender once; keep the models of the first repeat."""
        outs = self.models(method) if repeat == 0 else dict.fromkeys(self.models(method))
        setting = METHODS[method] | ({"group_size": self.case.group_size} if method == "gptq" else {})
        again = [ONE_MORE, EIGHT_MORE] if method == CLAIMED else []
        with tempfile.TemporaryDirectory(dir=self.folder) as aside:
            peer = self.peer(method, outs[PEER] or Path(aside, "model"))
        dense = self.own([setting], ["general"], outs["crosscal dense"], again)
        sequential = self.own([setting | {"upstream": "sequential"}], ["general"], outs["crosscal sequential"], [])
        found = {PEER: peer, "crosscal dense": dense, "crosscal sequential": sequential}
        if method == CLAIMED:
            found[SAME_DATA] = self.own([setting], ["general"], None, [], held_out=1)
            for name in REFINED:
                found[name] = self.own([recipe(name, setting["sparsity"])], ["general"], outs[name], [])
        return found


def contest(it: Contest, methods: list[str], repeats: int) -> Iterator[dict[str, Any]]:
    answers: dict[str, dict[str, list[Answer]]] = defaultdict(lambda: defaultdict(list))
    sweeps: dict[str, list[Answer]] = defaultdict(list)
    turns = [(repeat, method) for repeat in range(repeats) for method in methods if repeat == 0 or method == CLAIMED]
    for repeat, method in turns:
        for name, answer in it.one_variant(method, repeat).items():
            answers[method][name].append(answer)
            print(
                it.case.name,
                method,
                name,
                f"{spent(answer, 'wall'):.2f} s",
                f"{answer['peak_mib']:.0f} MiB",
                flush=True,
            )
        if method == CLAIMED:
            for name in PRUNERS:
                swept = it.own([recipe(name, SWEEP_SPARSITIES, SWEEP)], ["general", "biomedical"], None, [])
                sweeps[name].append(swept)
                print(it.case.name, "sweep", name, f"{spent(swept, 'wall'):.2f} s", flush=True)
    for method, by_name in answers.items():
        case = f"{it.case.name}, {method}"
        for name, found in by_name.items():
            yield from cost_rows(f"{case}, {name}", found)
            if name != PEER:
                yield from ratio_rows(f"{case}, {name}", 1, by_name[PEER], found)
    yield from error_rows(it, methods)
    if sweeps:
        yield from sweep_rows(it.case.name, answers[CLAIMED], sweeps)


def spent(answer: Answer, kind: str, stage: str = "all") -> float:
    return answer["stages"][stage][kind]


def cost_rows(case: str, found: list[Answer]) -> Iterator[dict[str, Any]]:
    for stage in found[0]["stages"]:
        for kind in ("wall", "cpu"):
            seconds = [answer["stages"][stage][kind] for answer in found]
            yield median_record(case, f"{stage}, {kind} time", seconds, "s")
    yield median_record(case, "peak memory of the process", [answer["peak_mib"] for answer in found], "MiB")


def error_rows(it: Contest, methods: list[str]) -> Iterator[dict[str, Any]]:
    models = {f"{method}, {name}": str(path) for method in methods for name, path in it.models(method).items()}
    judged = it.call(sys.executable, "evaluate.py", models=models)
    for name, figures in judged.items():
        case = f"{it.case.name}, {name}"
        for figure in ("calibration error", "held-out error", "sparsity"):
            yield record(case, figure, figures[figure], "ratio")
        yield record(case, "held-out perplexity", figures["perplexity"], "perplexity", figures["perplexity stderr"])
        peers = judged.get(f"{name.split(', ')[0]}, {PEER}")
        if peers and peers is not figures:
            ratio = figures["held-out error"] / peers["held-out error"]
            yield record(case, f"held-out error over {PEER}'s", ratio, "ratio")


def sweep_rows(case: str, one: dict[str, list[Answer]], sweeps: dict[str, list[Answer]]) -> Iterator[dict[str, Any]]:
    for name, found in sweeps.items():
        where = f"{case}, sweep of {SWEEP_VARIANTS}, {name}"
        yield from cost_rows(where, found)
        yield from ratio_rows(where, SWEEP_VARIANTS, one[PEER], found)
    pairs = list(zip(one[PEER], one["crosscal dense"], strict=True))
    labels = [(again["label"], count) for again, count in ((ONE_MORE, 1), (EIGHT_MORE, 8))]
    for (label, count), extent, kind in itertools.product(
        labels, ("solve", "with held-out losses and files"), ("wall", "cpu")
    ):
        stage = f"{label}, {extent}"
        ratios = [count * spent(peer, kind, "solve") / spent(own, kind, stage) for peer, own in pairs]
        figure = f"{stage}, on cached moments, the peer's solve over it, {kind} time"
        yield median_record(f"{case}, sparsegpt, crosscal dense", figure, ratios, "ratio")


def ratio_rows(case: str, runs: int, peers: list[Answer], own: list[Answer]) -> Iterator[dict[str, Any]]:
    """Yield the peer's time for `runs` runs over crosscal's, in wall and CPU time (less affected by other load)."""
    for kind in ("wall", "cpu"):
        ratios = [runs * spent(peer, kind) / spent(mine, kind) for peer, mine in zip(peers, own, strict=True)]
        label = PEER if runs == 1 else f"{runs} runs of {PEER}"
        yield median_record(case, f"{label} over crosscal, {kind} time", ratios, "ratio")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--testbed", type=Path)
    parser.add_argument("--cases", nargs="+", choices=("random", "testbed"), default=["random", "testbed"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the script; nothing is written")
    options = parser.parse_args()
    sys.path.insert(0, str(HERE))
    from case import random_case, testbed_case

    circumstances = f"circumstances, {' and '.join(options.cases)}"
    rows = [record(circumstances, "load average before", load_average(), "processes")]
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name, part) for part in ("random", "testbed")]
        for folder in folders:
            folder.mkdir()
        cases = [random_case(folders[0], tiny=options.tiny)] if "random" in options.cases else []
        if "testbed" in options.cases and options.testbed:
            cases.append(testbed_case(folders[1], options.testbed))
        for case in cases:
            rows += contest(Contest(case, case.model.parent, options.threads), options.methods, options.repeats)
    rows.append(record(circumstances, "load average after", load_average(), "processes"))
    for row in rows:
        spread = "" if row["spread"] is None else f"{row['spread']:.2g}"
        print(f"{row['case']} | {row['figure']} | {row['value']:.4g} | {spread} | {row['unit']}")
    if not options.tiny:
        write("vs_peers", rows, device=f"{cpu_model()}, {options.threads} thread(s)", keep=True)


if __name__ == "__main__":
    main()
