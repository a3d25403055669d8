"""Rows of a run, and what people see of them: a table in the terminal, one page with everything."""

from crosscal.report.html import write_report
from crosscal.report.rows import LayerRow, ResultRow, WindowRow, read_rows, write_rows

__all__ = ["LayerRow", "ResultRow", "WindowRow", "read_rows", "write_report", "write_rows"]
