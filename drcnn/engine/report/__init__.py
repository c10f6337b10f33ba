"""The report of runs: one HTML page that needs nothing besides itself."""

from drcnn.engine.report.analysis import Analysis, analyse
from drcnn.engine.report.page import Panel, Section, write_page
from drcnn.engine.report.sections import ReportedRun, sections_of

__all__ = ["Analysis", "Panel", "ReportedRun", "Section", "analyse", "sections_of", "write_page"]
