"""A comparison as files: PNG figures, one HTML page that needs nothing else, Markdown and JSON.

Curves stand in the page as SVG (text stays text, lines stay sharp and can be found by id), heat maps as PNG inside of
it.  The page loads nothing and runs no script, so it can be mailed, and MLflow shows it as it is.
"""

import base64
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from pipeline.compare.plots import curve_figures, heat_maps
from pipeline.compare.runs import ComparedRun
from pipeline.compare.summary import (
    RunSummary,
    Table,
    cautions,
    check_comparable,
    cost_table,
    count,
    differences,
    equal_tokens,
    results_table,
    summarize,
)
from pipeline.figures import DPI

TEMPLATE = Path(__file__).parent / "report.html.j2"
PAGE = "report.html"


@dataclass(frozen=True)
class Picture:
    """One figure of the page."""

    name: str
    caption: str
    markup: Markup


@dataclass(frozen=True)
class Comparison:
    """What `write_report` found and wrote.

    Attributes:
        title: names of the runs.
        markdown: the tables.
        files: everything written, the page first.
    """

    title: str
    markdown: str
    files: tuple[Path, ...]


def write_report(runs: Sequence[ComparedRun], folder: Path) -> Comparison:
    """Compare runs and write report.html, tables.md, summary.json and the figures into `folder`, made if absent.

    Raises:
        ValueError: fewer than two runs, or no loss over tokens that all have.
    """
    check_comparable(runs)
    tokens = equal_tokens(runs)
    summaries = [summarize(run, tokens) for run in runs]
    tables = {
        "Results": results_table(summaries, tokens),
        "Cost": cost_table(summaries),
        "What differs": differences(runs),
    }
    title = ", ".join(run.name for run in runs)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):  # of a comparison of other runs in the same folder
        old.unlink()
    files = [folder / PAGE, folder / "tables.md", folder / "summary.json"]
    pictures = list(_pictures(runs, summaries, folder, files))
    notes = cautions(runs)
    files[0].write_text(_render(title, tables, pictures, notes, runs, tokens), encoding="utf-8")
    markdown = _markdown(tables, notes)
    files[1].write_text(markdown, encoding="utf-8")
    numbers = {"equal_tokens": tokens, "runs": [summary.as_json() for summary in summaries]}
    files[2].write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    return Comparison(title, markdown, tuple(files))


def _pictures(
    runs: Sequence[ComparedRun], summaries: Sequence[RunSummary], folder: Path, files: list[Path]
) -> Iterator[Picture]:
    for name, caption, figure in curve_figures(runs, summaries):
        files.append(_save(figure, folder / f"{name}.png"))
        yield Picture(name, caption, _svg(figure, name))
    for run in runs:
        for name, caption, figure in heat_maps(run):
            files.append(_save(figure, folder / f"{name}.png"))
            data = base64.b64encode(files[-1].read_bytes()).decode()
            image = Markup('<img alt="{}" src="data:image/png;base64,{}">').format(caption, data)
            yield Picture(name, caption, image)


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=DPI)
    return path


def _svg(figure: Figure, name: str) -> Markup:
    text = io.StringIO()
    # A salt per figure: the ids of clip paths and markers of two figures on one page must not be the same.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return Markup(re.sub(r"^.*?(?=<svg)", "", text.getvalue(), flags=re.DOTALL))


def _render(
    title: str,
    tables: dict[str, Table],
    pictures: Sequence[Picture],
    notes: Sequence[str],
    runs: Sequence[ComparedRun],
    tokens: float,
) -> str:
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        tables=tables,
        pictures=pictures,
        notes=notes,
        runs=runs,
        tokens=count(tokens),
        time=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _markdown(tables: dict[str, Table], notes: Sequence[str]) -> str:
    parts = [
        f"## {title}\n\n{table.markdown() if table.rows else 'Nothing.' + chr(10)}" for title, table in tables.items()
    ]
    return "\n".join([*parts, *(f"Note: {note}\n" for note in notes)])
