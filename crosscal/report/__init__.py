"""Rows of a run and their presentation: a table in the terminal and a single HTML page."""

from crosscal.report.html import write_report
from crosscal.report.rows import LayerRow, ResultRow, WindowRow, read_rows, write_rows

__all__ = ["LayerRow", "ResultRow", "WindowRow", "read_rows", "write_report", "write_rows"]
