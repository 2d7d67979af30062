"""`hashemb report`: parse the options and write one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from hashemb._packages import require
from hashemb.cli.arguments import DataFormat, Label
from hashemb.cli.console import print_line, progress_bar
from hashemb.cli.models import app, typer
from hashemb.ctr._replacing import replacing
from hashemb.ctr.report import gather, page

if TYPE_CHECKING:
    import typer

__all__ = ["report"]


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of the model.")],
    files: Annotated[
        list[Path] | None, typer.Argument(help="Labelled data to score. [default: metrics recorded in training]")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Page to write. [default: RUN.html]")
    ] = None,
    user: Annotated[
        str | None, typer.Option(metavar="FIELD", help="Field that identifies the user; adds the GAUC.")
    ] = None,
    compare: Annotated[
        list[Path] | None, typer.Option(metavar="RUN", help="Another model, for AUC against memory. Repeatable.")
    ] = None,
    data_format: DataFormat = None,
    label: Label = None,
) -> None:
    """Write a page about a model: learning curve, calibration, collisions, norms, AUC against memory."""
    for package in ("matplotlib", "jinja2"):  # needed later: fail before anything is scored
        require(package, "report")
    target = output or run.absolute().with_name(run.absolute().name + ".html")
    console = require("rich.console").Console(stderr=True)
    with progress_bar(console, "scoring", None) as advance:
        facts = gather(
            run, files or (), user=user, compare=compare or (), progress=advance, data_format=data_format, label=label
        )
    with replacing(target) as temporary:
        temporary.write_text(page(facts), encoding="utf-8")
    print_line(str(target))
