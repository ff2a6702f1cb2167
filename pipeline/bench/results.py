"""Results on disk: CSV files that say where they were measured, and the tables of a page that are made from them.

Measuring and drawing are apart, so that figures and tables can be made anywhere from the CSV of a GPU machine.

    # 2026-01-31, NVIDIA H100 80GB HBM3 ...          head: as many comment lines as there are
    case,operation,variant,...                       one line per measured number

A page holds tables between two comments, which a reader of the page does not see; whatever stands between them is
replaced:

    <!-- bench: sparsify -->
    <!-- end -->
"""

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

Row = Mapping[str, str]


class Results(NamedTuple):
    """A CSV file."""

    head: list[str]
    """Where and when it was measured."""
    rows: list[Row]


def write_csv(path: Path, head: Sequence[str], columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> None:
    """Write `rows`, which have exactly `columns`, under comment lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        file.writelines(f"# {line}\n" for line in head)
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> Results:
    """What `write_csv` wrote."""
    lines = path.read_text(encoding="utf-8").splitlines()
    head = [line.removeprefix("# ") for line in lines if line.startswith("#")]
    return Results(head, list(csv.DictReader(line for line in lines if not line.startswith("#"))))


def extend_csv(
    path: Path,
    head: Sequence[str],
    columns: Sequence[str],
    rows: Sequence[Mapping[str, object]],
    *,
    keys: Sequence[str],
) -> None:
    """As `write_csv`, but keep rows of an earlier call on the same machine, day, versions and commit (the same head).

    Args:
        path: of the file.
        head: comment lines.
        columns: of every row.
        rows: new ones.
        keys: columns that say what was measured; earlier rows with the keys of new ones go.
    """
    earlier = read_csv(path) if path.is_file() else Results([], [])
    new = {tuple(str(row[key]) for key in keys) for row in rows}
    same = earlier.head == list(head) and (not earlier.rows or set(earlier.rows[0]) == set(columns))
    kept = [row for row in earlier.rows if same and tuple(row[key] for key in keys) not in new]
    write_csv(path, head, columns, [*kept, *rows])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column is text, the others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def source(head: Sequence[str], folder: Path, *names: str) -> str:
    """Last line of a fragment: the machine, and the CSV files in `folder`."""
    files = ", ".join(f"[{name}.csv]({folder.name}/{name}.csv)" for name in names)
    return f"{'; '.join(head)}. All numbers: {files}."


def publish(folder: Path, fragments: Mapping[str, str], console: Console) -> None:
    """Put the fragments on the page of `folder` (docs/performance.md of docs/performance), if there is one."""
    page = folder.with_suffix(".md")
    for name in update_page(page, fragments) if page.is_file() else []:
        console.print(f"{page} has no place for '{name}': <!-- bench: {name} --> and <!-- end -->", markup=False)


def publish_table(
    folder: Path, name: str, *, title: str, table: str, picture: str, head: Sequence[str], console: Console
) -> None:
    """Show the table of a benchmark that has one, and put it with its picture on the page of `folder`.

    Args:
        folder: of `name`.csv and `name`.png.
        name: of the benchmark.
        title: above the table.
        table: Markdown.
        picture: what the picture shows.
        head: where the numbers were measured.
        console: to show the table on.
    """
    console.print(table, markup=False, highlight=False)
    drawn = f"![{picture}]({folder.name}/{name}.png)"
    publish(folder, {name: "\n\n".join([f"{title}.", table, drawn, source(head, folder, name)])}, console)


def update_page(page: Path, fragments: Mapping[str, str]) -> list[str]:
    """Put each fragment between the comments that name it.

    Returns:
        Names that the page has no place for.
    """
    text, missing = page.read_text(encoding="utf-8"), []
    for name, fragment in fragments.items():
        place = re.compile(rf"(<!-- bench: {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = place.subn(lambda match, body=fragment: f"{match[1]}{body}\n{match[2]}", text)  # type: ignore[misc]
        if not count:
            missing.append(name)
    page.write_text(text, encoding="utf-8")
    return missing
