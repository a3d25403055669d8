"""Rows of a Hugging Face dataset."""

from __future__ import annotations

from collections.abc import Iterator

from crosscal.corpora.forms import candidate, columns_wanted
from crosscal.corpora.limits import DocumentLimits
from crosscal.corpora.records import Document, Reject, no_column
from crosscal.corpora.sources import HubDataset, named_split
from crosscal.errors import CorpusError
from crosscal.files import excerpt


def read_hub(
    dataset: HubDataset, text: str, revision: str | None, limits: DocumentLimits
) -> Iterator[tuple[str | None, Document | Reject]]:
    """Yield (split, candidate) for every row. Splits that are not train, validation or test count as unnamed.

    Raises `CorpusError` if the dataset cannot be loaded.
    """
    from datasets import DatasetDict, load_dataset
    from datasets.exceptions import DatasetsError

    try:
        splits = load_dataset(dataset.name, dataset.config, revision=revision)
    except (OSError, ValueError, DatasetsError) as error:  # incl. not found, offline, no config
        raise CorpusError(
            "neither a path here nor a dataset that can be loaded from the hub",
            where=dataset.name,
            got=excerpt(str(error)),
            do="Check the path, or the id as owner/name or owner/name:config.",
        ) from error
    assert isinstance(splits, DatasetDict)  # neither one split nor streaming was asked for
    for split, rows in splits.items():
        source = f"{dataset.name}@{revision}/{split}" if revision else f"{dataset.name}/{split}"
        wanted = columns_wanted(rows.column_names, text)
        if not wanted:
            yield None, no_column(source, 0, text, rows.column_names)
            continue
        for number, record in enumerate(rows.select_columns(wanted), start=1):
            assert isinstance(record, dict)  # no other format was set
            yield named_split(str(split)), candidate(record, text, source, number, limits)
