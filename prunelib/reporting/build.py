"""Writes the files of a report: table, summary, plots and page."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunelib.errors import InputError, IntegrityError
from prunelib.reporting.artefacts import Report, load_report
from prunelib.reporting.flags import find_flags, flags_of
from prunelib.reporting.html import render
from prunelib.reporting.plots import PLOTS, draw
from prunelib.reporting.published import compare, load_published
from prunelib.reporting.table import (
    load_cells,
    paired_differences,
    summarise,
    summary_tree,
    to_csv,
)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file beside its final name and rename it, so that no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def build(
    params: Mapping[str, Any], out: Path, *, published: Path | None = None, partial: bool = False
) -> Path:
    """Make a report from its description and write it into ``out``.

    Written: ``benchmark.csv``, ``summary.json``, ``plots/*.png`` and, last, ``report.html``. A plot
    of an earlier report that has no figures any more is removed.

    Args:
        params: the description (``artefacts.load_report``).
        out: directory of the files.
        published: directory of published figures; none are shown without it.
        partial: accept cells with missing artefacts.

    Returns:
        The path of report.html.

    Raises:
        InputError: the description is not valid.
        IntegrityError: nothing is finished, or artefacts are missing and ``partial`` is not set.
    """
    report = load_report(params)
    _check_finished(report, partial=partial)
    flags = find_flags(report)
    frame = load_cells(report)
    frame["flags"] = [flags_of(cell.id, flags) for cell in report.cells]
    summary, csv, plots = summarise(frame), to_csv(frame), draw(report)
    page = render(
        report,
        frame=frame,
        summary=summary,
        paired=paired_differences(report),
        flags=flags,
        comparisons=compare(report, load_published(published)) if published else [],
        plots=plots,
        csv=csv,
    )
    tree = json.dumps(summary_tree(summary), indent=2, sort_keys=True, allow_nan=False)
    write_atomically(out / "benchmark.csv", csv.encode())
    write_atomically(out / "summary.json", f"{tree}\n".encode())
    for plot in plots:
        write_atomically(out / "plots" / f"{plot.name}.png", plot.png)
    drawn = {plot.name for plot in plots}
    for name in {make.__name__ for make in PLOTS} - drawn:
        (out / "plots" / f"{name}.png").unlink(missing_ok=True)
    path = out / "report.html"
    write_atomically(path, page.encode())
    return path


def _check_finished(report: Report, *, partial: bool) -> None:
    if not report.cells:
        raise InputError("report request: no cells; at least one is needed")
    if not any(cell.artefacts for cell in report.cells):
        raise IntegrityError(f"nothing to report: none of {len(report.cells)} cells is finished")
    unfinished = [cell for cell in report.cells if cell.missing]
    if unfinished and not partial:
        step, why = next(iter(unfinished[0].missing.items()))
        raise IntegrityError(
            f"{len(unfinished)} of {len(report.cells)} cells are not finished, the first is "
            f"{unfinished[0].id} ({step}: {why}); --partial reports the others"
        )
