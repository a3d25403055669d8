"""`python -m crosscal` is `crosscal`."""

from crosscal.cli import main

main()
