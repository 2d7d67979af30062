"""Points in time of a table: snapshots, deltas, and the scans that check them."""

from hashemb._points.delta import DeltaInfo, Since, apply_to, check_delta, delta_info, export_to
from hashemb._points.delta_file import DeltaReader
from hashemb._points.half import widen
from hashemb._points.problems import Problem, Progress, Report
from hashemb._points.scan import Covered, Limits, Scan, Sink, UnreadableError
from hashemb._points.snapshot import interrupted_delta, take_snapshot

__all__ = [
    "Covered",
    "DeltaInfo",
    "DeltaReader",
    "Limits",
    "Problem",
    "Progress",
    "Report",
    "Scan",
    "Since",
    "Sink",
    "UnreadableError",
    "apply_to",
    "check_delta",
    "delta_info",
    "export_to",
    "interrupted_delta",
    "take_snapshot",
    "widen",
]
