"""Describe a model: what it contains, what it has learned, and a page about it."""

from hashemb.ctr.report.facts import gather
from hashemb.ctr.report.inspection import describe, steps_lost
from hashemb.ctr.report.page import page

__all__ = ["describe", "gather", "page", "steps_lost"]
