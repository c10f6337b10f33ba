"""Checking data: every problem with file and id, statistics, and a repaired copy."""

from drcnn.data.audit.anchors import AnchorGrid, model_anchors
from drcnn.data.audit.checks import Audit, audit
from drcnn.data.audit.find import Found, config_sources, find_sources
from drcnn.data.audit.findings import KINDS, Finding
from drcnn.data.audit.repair import Repair, repair
from drcnn.data.audit.statistics import Distribution, SplitStatistics

__all__ = [
    "KINDS",
    "AnchorGrid",
    "Audit",
    "Distribution",
    "Finding",
    "Found",
    "Repair",
    "SplitStatistics",
    "audit",
    "config_sources",
    "find_sources",
    "model_anchors",
    "repair",
]
