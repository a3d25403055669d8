"""Check whether landed text would change the models, once windows are drawn and before the calibration pass.

The ledger does not know how long a plan's windows are. So a run draws them, which costs the tokens that landed, and
ends as `unchanged` when its models would be those of the last finished run, or when the domain's documents do not fill
one window yet. Landed text that fills no window stays in the pool, and counts with the landing that fills the next one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from crosscal.errors import TooLittleText
from crosscal.evaluation import TEST, VALIDATION
from crosscal.landing import Ledger
from crosscal.landing.runs import FINISHED
from crosscal.stages.heldout_text import windows_for
from crosscal.store import digest_of
from crosscal.tasks.corpora import corpus_of
from crosscal.tasks.evaluation import cutting_of
from crosscal.tasks.mixtures import open_variants, rule_texts, ruled_variants
from crosscal.tasks.run_spec import RunSpec


class NothingNew(Exception):
    """The run would make no new models: its inputs are unchanged, or the domain has too little text."""

    def __init__(self, reason: str, version: int | None = None, inputs: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.version, self.inputs = reason, version, inputs


@dataclasses.dataclass
class News:
    """The inputs of one run of a domain, compared with those of the last finished run."""

    ledger: Ledger
    domain: str
    is_asked: bool = False
    """Whether a user requested the run: then its inputs need not be new."""
    inputs: str | None = None
    """Digest of everything that determines the models, once it is known."""

    def check(self, spec: RunSpec, stored: Mapping[str, str]) -> None:
        """Raise `NothingNew` for unchanged inputs, `TooLittleText` when a corpus has too little held-out text."""
        self.inputs = inputs_of(spec, stored)
        last = self._last()
        version = spec.versions.get(self.domain)
        if last is not None and last["inputs"] == self.inputs and not self.is_asked:
            reason = f"no new training window since v{last['version']}; the landed text does not fill one yet"
            raise NothingNew(reason, version, self.inputs)
        if last is None:
            self._check_text(spec, stored)

    def explained(self, error: NothingNew | TooLittleText) -> NothingNew:
        """Return too little text of the domain as `NothingNew`; of another corpus it is a failure and raised again."""
        if isinstance(error, NothingNew):
            return error
        if error.where != self.domain:
            raise error
        named = ", ".join(sorted(self._named_for_a_split()))
        why = f"all documents of {named} belong to the split that their file is named for; " if named else ""
        return NothingNew(f"{error.what} (got {error.got}); {why}what has landed counts as soon as enough has")

    def _named_for_a_split(self) -> set[str]:
        files = self.ledger.look().files(self.domain)
        return {name for file in files if "split" in file.states[-1] for name in file.names}

    def _last(self) -> dict[str, Any] | None:
        """Return version and inputs of the newest finished run that recorded its inputs."""
        for run in reversed(self.ledger.runs(self.domain)):
            if run.state in FINISHED and run.states[-1].get("inputs"):
                return {"version": run.version, "inputs": run.states[-1]["inputs"]}
        return None

    def _check_text(self, spec: RunSpec, stored: Mapping[str, str]) -> None:
        """Require one test window to report and two validation windows to decide.

        Checked before the first run only, since held-out text only grows.
        """
        plan = spec.parsed
        needed = [(self.domain, TEST, 1)] if self.domain in plan.perplexity_corpora else []
        needed += [(name, VALIDATION, 2) for name in (plan.publish.corpora if plan.publish else ())]
        for name, split, least in needed:
            corpus = corpus_of(spec, name, stored[name])
            found = len(windows_for(spec.store, corpus, split, spec.source(), cutting_of(plan)))
            if found < least:
                do = "Give it more validation documents."
                raise TooLittleText(f"too little {split} text to decide by", where=name, got=f"{found} window", do=do)


def inputs_of(spec: RunSpec, stored: Mapping[str, str]) -> str:
    """Return the digest of all that determines a run's models: plan, model, dtype, training windows, and the held-out
    text by which open mixtures are chosen."""
    windows = [(sample.corpus, sample.seed, sample.calibration.key) for sample in spec.sampled]
    return digest_of([spec.plan, spec.model, spec.dtype, windows, *_chosen_by(spec, stored)])


def _chosen_by(spec: RunSpec, stored: Mapping[str, str]) -> list[list[str]]:
    """Return digests of the text by which mixtures are chosen: held-out windows, and for a rule validation windows."""
    searching, ruled = open_variants(spec), ruled_variants(spec)
    if not searching:
        return []
    texts = [text for variant in searching if variant.name in ruled for text in rule_texts(spec, stored, variant)]
    return [[sample.held_out.key for sample in spec.sampled], [text.digest for text in texts]]
