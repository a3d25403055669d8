"""Write the demo's corpora and questions from its grammar, or check that the files kept here are what it writes.

python data/demo/make_corpora.py            # write
python data/demo/make_corpora.py --check    # compare, exit 1 at a difference
"""

import argparse
import json
import sys
from itertools import islice
from pathlib import Path
from random import Random

import zstandard
from grammar.biomedical import BIOMEDICAL
from grammar.documents import documents
from grammar.general import GENERAL
from grammar.legal import LEGAL
from grammar.questions import questions
from grammar.world import Domain

HERE = Path(__file__).parent
DOMAINS = (GENERAL, BIOMEDICAL, LEGAL)
DOCUMENTS = {
    "general": {"test": 120, "validation": 100, "train": 800},
    "biomedical": {"test": 120, "validation": 100, "train": 550},
    "legal": {"test": 120, "validation": 100, "train": 550},
}
QUESTIONS = 120


def splits(domain: Domain) -> dict[str, list[str]]:
    """The documents of each split; none occurs twice."""
    counts = DOCUMENTS[domain.name]
    written = documents(domain, Random(f"{domain.name} documents"))
    distinct: dict[str, None] = {}  # in the order written
    while len(distinct) < sum(counts.values()):
        distinct[next(written)] = None
    remaining = iter(distinct)
    return {split: list(islice(remaining, count)) for split, count in counts.items()}


def files() -> dict[Path, str]:
    """Every generated file, path below this folder to text."""
    generated = {}
    for domain in DOMAINS:
        for split, split_texts in splits(domain).items():
            rows = [{"text": text, "source": f"crosscal-demo/{domain.name}"} for text in split_texts]
            generated[Path("corpora", domain.name, f"{split}.jsonl.zst")] = _lines(rows)
        asked = questions(domain, QUESTIONS, Random(f"{domain.name} questions"))
        generated[Path("tasks", f"{domain.name}_facts.jsonl")] = _lines(asked)
    return generated


def read(path: Path) -> str:
    """The text of a generated file, unpacked if need be."""
    packed = path.read_bytes()
    return (zstandard.decompress(packed) if path.suffix == ".zst" else packed).decode()


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = text.encode()
    path.write_bytes(zstandard.compress(raw, level=19) if path.suffix == ".zst" else raw)


def _lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="compare only, and exit with 1 at a difference")
    if not parser.parse_args().check:
        for path, text in files().items():
            write(HERE / path, text)
        return 0
    different = [path for path, text in files().items() if not (HERE / path).exists() or read(HERE / path) != text]
    for path in different:
        print(f"{path}: not what the grammar writes", file=sys.stderr)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
