"""The report of a run: numbers (`summary.json`), pictures and a page that needs nothing but itself.

    summary = summarise(run_dir)     # writes summary.json
    print(describe(summary))
    page = write_report(run_dir)     # writes summary.json, curve.png and report.html

Reads what the run left behind; needs no torch, and no run that came to its end.
"""

from sop.report.page import write_report
from sop.report.summary import summarise
from sop.report.words import describe

__all__ = ["describe", "summarise", "write_report"]
