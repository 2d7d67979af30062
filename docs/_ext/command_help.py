"""Sphinx extension: the directive ``command-help`` shows what ``hashemb [COMMAND] --help`` prints.

The help comes from the program itself, so the page cannot differ from it. A command that no page shows is a warning.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

logger = logging.getLogger(__name__)


def help_of(*command: str) -> str:
    """Return the help of a command, 88 columns wide and without colours."""
    environment = {**os.environ, "COLUMNS": "88", "TERMINAL_WIDTH": "88", "NO_COLOR": "1", "TERM": "dumb"}
    program = [sys.executable, "-m", "hashemb", *command, "--help"]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())


class CommandHelp(SphinxDirective):
    """Show the help of the command in the argument, such as ``hashemb train``."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        command = self.arguments[0].split()[1:]
        self.env.metadata[self.env.docname].setdefault("commands", []).extend(command)
        text = help_of(*command)
        return [nodes.literal_block(text, text, language="text")]


def missing_commands(app: Sphinx, env: BuildEnvironment) -> None:
    """Warn about commands in the program's help that no page shows."""
    documented = {name for page in env.metadata.values() for name in page.get("commands", [])}
    for name in re.findall(r"^    (\w+)  ", help_of(), re.MULTILINE):
        if name not in documented:
            logger.warning("no page shows the help of 'hashemb %s'", name)


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("command-help", CommandHelp)
    app.connect("env-check-consistency", missing_commands)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
