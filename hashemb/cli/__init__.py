"""The command line."""

from hashemb.cli.dispatch import main

__all__ = ["main"]
