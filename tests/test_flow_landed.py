"""Real runs of a landed domain with a tiny model: killed between any two steps, started many times at once."""

from __future__ import annotations

import json
import random
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from crosscal.corpora import ingest
from crosscal.errors import UsageError
from crosscal.flows import pipeline
from crosscal.flows.recompress import recompress
from crosscal.landing import Ledger, ledger, take_in
from crosscal.plan import BEST, CompressionPlan
from crosscal.publication import Published
from crosscal.store import Store
from crosscal.store.processes import this_process
from crosscal.store.refs import Refs
from crosscal.variants import Variant
from tests.helpers.tiny_place import Place, make_place, write_documents

pytestmark = pytest.mark.slow

LEGAL = "legal"
DEAD = re.sub(r"\d+$", "1", this_process())
"""An earlier process that had the same number as this one."""


class Killed(BaseException):
    """Simulates SIGKILL: from here on the process writes nothing."""


@pytest.fixture(scope="module")
def landed(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A place with a landing place, and a store that already holds the moments of the corpora."""
    place = make_place(tmp_path_factory.mktemp("landed"))
    write_plan(place)
    (place.folder / "landing").mkdir()
    (place.folder / "legal").rename(place.folder / "landing" / LEGAL)
    take_in(Store(place.home), str(place.folder / "landing"), 0)
    warm = place.folder / "warm"
    shutil.copytree(place.home, warm)
    go(place, home=warm)
    for kind in ("moments", "calibration", "sites", "corpora"):
        shutil.copytree(warm / "objects" / kind, place.home / "objects" / kind, dirs_exist_ok=True)
    return place


def write_plan(place: Place, **publish: Any) -> None:
    place.write_plan(
        corpora={"general": "general", "$domain": {}},
        compress=[{"method": "wanda", "sparsity": [0.5, 0.6], "domain": "$domain"}],
        publish={"domain": "$domain", "tolerance": 0.5, **publish},
    )


@pytest.fixture
def place(landed: Place, tmp_path: Path) -> Place:
    """The same with its own copy of the store."""
    shutil.copytree(landed.home, tmp_path / "home")
    for name in ("model", "general", "plan.yaml", "landing"):
        (tmp_path / name).symlink_to(landed.folder / name)
    return Place(tmp_path)


def go(place: Place, *overrides: str, home: Path | None = None, domain: str = LEGAL) -> dict[str, Any]:
    run = recompress.fn
    return run(str(place.plan), list(overrides), str(home or place.home), str(place.folder / "runs"), domain)


def outcomes(store: Store) -> list[str]:
    return [run.state for run in Ledger(store).runs(LEGAL)]


@contextmanager
def killed_after(writes: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Simulate a process that dies after `writes` records; other processes find that it has ended."""
    append, left = Refs.append, [writes]

    def dying(self: Refs, *args: Any) -> int:
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        return append(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Refs, "append", dying)
        patch.setattr(ledger.heartbeat, "begin", lambda home: DEAD)
        yield


def each_death(act: Callable[[Path], None], home: Path, copies: Path, patch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield homes in which `act` was killed after 0, 1, 2, … records, until it completes."""
    for writes in range(20):
        copy = copies / f"after-{writes}"
        shutil.copytree(home, copy)
        try:
            with killed_after(writes, patch):
                act(copy)
        except Killed:
            yield copy
        else:
            return
    raise AssertionError("it never came through")


def test_killed_between_any_two_records_the_next_run_ends_the_same(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = tmp_path / "calm"
    shutil.copytree(place.home, calm)
    go(place, home=calm)
    expected = Published(Store(calm)).current(LEGAL)
    assert expected is not None
    deaths = 0
    for home in each_death(lambda home: go(place, home=home) and None, place.home, tmp_path, monkeypatch):
        deaths += 1
        store = Store(home)
        begun = outcomes(store)
        if begun != ["published"]:
            assert Ledger(store).holder(LEGAL) is None
            go(place, home=home)
        assert outcomes(store) == [*(["abandoned"] if begun else []), "published"]
        assert [move.model for move in Published(store).history(LEGAL)] == [expected.model]
        assert Ledger(store).pending(LEGAL) is None
        assert {entry.state for entry in Ledger(store).entries(LEGAL)} == {"published"}
    assert deaths == 6, "general's corpus, claimed, recompressed, evaluated, the pointer, published"


def test_a_sweep_killed_between_any_two_records_is_made_up_for(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    landing = tmp_path / "more"
    (landing / LEGAL).mkdir(parents=True)
    write_documents(landing / LEGAL / "a.jsonl", seed="a", count=5)
    write_documents(landing / LEGAL / "b.jsonl", seed="b", count=5)
    sweep = lambda home: take_in(Store(home), str(landing), 0) and None  # noqa: E731
    deaths = list(each_death(sweep, place.home, tmp_path, monkeypatch))
    for home in deaths:
        sweep(home)
        ledger = Ledger(Store(home))
        ways = [[line["state"] for line in entry.states] for entry in ledger.entries(LEGAL)]
        assert ways == [["landed", "ingested"]] * 5
        assert ledger.pending(LEGAL) == 5
    assert len(deaths) == 8, "landed, corpus, request, ingested, of two files"


def test_started_many_times_at_once_while_more_lands(place: Place, tmp_path: Path) -> None:
    """Announced nine times from three threads while three versions land: one run for each newest version."""
    chance, log = random.Random(0), []
    begun = threading.Event()

    def announced(_: int) -> None:
        log.append(go(place))
        begun.set()

    def lands(number: int) -> None:
        begun.wait(60)
        file = tmp_path / f"more-{number}.jsonl"
        write_documents(file, seed=file.stem, count=10)
        version = ingest(Store(place.home), LEGAL, [str(file)]).corpus.version
        Ledger(Store(place.home)).request(LEGAL, version)

    with ThreadPoolExecutor(3) as pool:
        work = [(lands, n) for n in range(3)] + [(announced, n) for n in range(8)]
        chance.shuffle(work)
        waiting = [pool.submit(announced, -1), *(pool.submit(act, n) for act, n in work)]
        for done in waiting:
            done.result()
    go(place)
    ledger = Ledger(Store(place.home))
    versions = [run.version for run in ledger.runs(LEGAL)]
    assert versions == sorted(set(versions)), "no version twice, none after a newer one"
    assert versions[-1] == 6
    assert set(outcomes(Store(place.home))) == {"published"}
    assert sum(len(record["runs"]) for record in log) <= len(versions) <= 4
    assert all("nothing" in record["message"] for record in log if not record["runs"])


def test_a_worse_model_is_kept_and_says_why(place: Place) -> None:
    first = go(place)["runs"][0]
    others = {"wanda-50-legal-a0.5", "wanda-60-legal-a0.5"} - {first["variant"]}
    ingest(Store(place.home), LEGAL, [str(more(place))])
    Ledger(Store(place.home)).request(LEGAL, 4)
    record = go(place, f"publish.variant={others.pop()}", "publish.tolerance=0")
    assert record["runs"][0]["outcome"] == "kept"
    assert re.search(r"kept: legal worse by [\d.]+ ± [\d.]+ % than the published model", record["message"])
    assert [move.corpus_version for move in Published(Store(place.home)).history(LEGAL)] == [3]
    (_, kept) = Ledger(Store(place.home)).runs(LEGAL)
    assert kept.states[-1]["perplexity"]["candidate"][LEGAL] > kept.states[-1]["perplexity"]["published"][LEGAL]


def more(place: Place, count: int = 10) -> Path:
    file = place.folder / "more.jsonl"
    write_documents(file, seed="more", count=count)
    return file


def test_the_pointer_never_goes_back_to_an_older_version_by_itself(place: Place) -> None:
    go(place)
    store = Store(place.home)
    current = Published(store).current(LEGAL)
    assert current is not None
    Published(store).move(LEGAL, current, {**current.facts, "corpus_version": 9})
    ledger = Ledger(store)
    ingest(store, LEGAL, [str(more(place))])
    ledger.request(LEGAL, 4)
    record = go(place)
    assert record["runs"][0]["outcome"] == "kept"
    assert "the newer version 9 is published" in record["message"]


def test_what_lands_during_a_run_is_the_next_runs(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """More documents land between ingest and sampling; the run keeps the version it began with."""
    needed = pipeline.samples_needed

    def lands(plan: CompressionPlan, asked: Sequence[Variant]) -> list[tuple[str, int]]:
        ingest(Store(place.home), LEGAL, [str(more(place, 200))])
        return needed(plan, asked)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "samples_needed", lands)
        first = go(place)["runs"][0]
    assert go(place)["runs"] == [], "what nobody asked for does not run"
    Ledger(Store(place.home)).request(LEGAL, 4)
    second = go(place)["runs"][0]
    assert [first["version"], second["version"]] == [3, 4]
    assert [shards_sampled(run["run_dir"]) for run in (first, second)] == [1, 2]


def shards_sampled(run_dir: str) -> int:
    samples = json.loads((Path(run_dir) / "identity.json").read_text())["sets"]
    return next(len(sample["calibration"]["apart"]) for sample in samples if sample["corpus"] == LEGAL)


@pytest.mark.parametrize("candidate", [BEST, "wanda-60-legal-a0.5"])
def test_the_candidate_is_the_best_or_the_one_named(place: Place, candidate: str) -> None:
    record = go(place, f"publish.variant={candidate}")["runs"][0]
    rows = [json.loads(line) for line in (Path(record["run_dir"]) / "results.jsonl").read_text().splitlines()]
    chosen_by, reported = (
        {row["variant"]: row["value"] for row in rows if (row["corpus_or_task"], row["split"]) == (LEGAL, split)}
        for split in ("validation", "test")
    )
    best = min((name for name in chosen_by if name != "dense"), key=lambda name: chosen_by[name])
    assert record["variant"] == (best if candidate == BEST else candidate)
    assert record["perplexity"]["candidate"][LEGAL] == reported[record["variant"]]


def test_without_a_policy_nothing_is_published(place: Place) -> None:
    record = go(place, "publish=null")
    assert record["runs"][0]["outcome"] == "kept"
    assert Published(Store(place.home)).current(LEGAL) is None
    assert Ledger(Store(place.home)).pending(LEGAL) is None


@pytest.mark.parametrize("domain", ["../legal", "a/b", "", "LEGAL", "a b", "legal\n", "$domain"])
def test_a_name_from_an_event_is_checked_before_anything_else(place: Place, domain: str) -> None:
    before = sorted(place.home.rglob("*"))
    with pytest.raises(UsageError, match="not a valid"):
        go(place, domain=domain)
    assert sorted(place.home.rglob("*")) == before


def test_a_failure_is_an_attempt_and_an_interruption_hardly(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (OSError("the disk went away"), KeyboardInterrupt()):
        with monkeypatch.context() as patch:
            patch.setattr("crosscal.flows.landed.load_plan", raising(error))
            with pytest.raises(type(error)):
                go(place)
    assert outcomes(Store(place.home)) == ["failed", "abandoned"]
    go(place)
    assert outcomes(Store(place.home)) == ["failed", "abandoned", "published"]


def raising(error: BaseException) -> Callable[..., None]:
    def raises(*args: object) -> None:
        raise error

    return raises
