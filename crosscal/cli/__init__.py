"""The command line. Every command imports its dependencies when it is called, so that `--help` answers at once."""

from __future__ import annotations

import errno
import logging
import os
import sys
from typing import NoReturn

import typer

from crosscal.cli import (
    deploying,
    domains,
    enough,
    methods,
    plans,
    publishing,
    runs,
    selecting,
    status,
    stores,
    studies,
)
from crosscal.errors import CrosscalError

INTERRUPTED = 130
_ANOTHER = "Name another folder, or give the user of this process the right to use this one."
REMEDIES = {
    errno.EACCES: _ANOTHER,
    errno.EPERM: _ANOTHER,
    errno.EROFS: _ANOTHER,
    errno.ENOSPC: "Free disk space, then run again: what is stored is kept.",
    errno.EDQUOT: "Free disk space, then run again: what is stored is kept.",
    errno.EMFILE: "Allow this process more open files (`ulimit -n`).",
}

app = typer.Typer(
    help="Calibrate once, compress every way: domain-aware pruning and quantization of language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (
    runs.run,
    studies.study,
    runs.ingest,
    selecting.select,
    runs.evaluate,
    enough.enough,
    runs.report,
    methods.methods,
    publishing.ledger,
    publishing.publish,
    deploying.deploy,
    deploying.worker,
    status.status,
):
    app.command()(command)
app.add_typer(stores.app, name="store")
app.add_typer(domains.app, name="domain")
app.add_typer(plans.app, name="plan")


def main() -> None:
    """Run the command line. A failure prints a message and sets the exit code; a traceback means a bug in crosscal."""
    os.environ.setdefault("DO_NOT_TRACK", "1")  # Prefect and the hub's client would send usage statistics
    # Idle torch threads sleep instead of spinning: on a shared machine spinning made evaluation 6 times as slow.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _log_to_stderr()
    try:
        app()
    except CrosscalError as error:
        _fail(error, error.exit_code)
    except OSError as error:
        _fail(_of_machine(error), 1)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            print("crosscal: interrupted; the same command goes on where it stopped", file=sys.stderr)
        raise


def _of_machine(error: OSError) -> Exception:
    """Return an error with a remedy: a full disk or a read-only folder is a condition of the machine, not a bug."""
    if error.filename is None or error.strerror is None:
        return error
    do = REMEDIES.get(error.errno or 0, "")
    return CrosscalError(error.strerror.lower(), where=str(error.filename), do=do)


def _fail(error: Exception, exit_code: int) -> NoReturn:
    if os.environ.get("CROSSCAL_TRACEBACK"):
        raise error
    print(f"crosscal: {error}", file=sys.stderr)
    sys.exit(exit_code)


def _log_to_stderr() -> None:
    """Log stages and slow steps to stderr with the time of day, for `crosscal`'s own loggers only."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("crosscal")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
