"""Which run directories the words of a command line mean.

A word is, in this order: a run directory, a run below the root by its name, a pattern of names (`qsparse-*`), a sweep
(all its runs), or the beginning of an MLflow run id.  `--where KEY=VALUE` keeps those whose configuration or last
metric says so.  A word that means nothing is an error that names what there is; none is skipped.
"""

import difflib
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from pipeline.compare.runs import read_settings
from pipeline.metrics import read_metrics, series
from pipeline.run_directory import RunDirectory

MIN_ID = 6
_COMPARISONS: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "=": operator.eq,
    "!=": operator.ne,
}
_CONDITION = re.compile(r"(?P<key>[\w./-]+)\s*(?P<operator><=|>=|!=|=|<|>)\s*(?P<value>.+)")


class Condition(NamedTuple):
    """`KEY OPERATOR VALUE`."""

    key: str
    operator: str
    value: str


def is_run(path: Path) -> bool:
    """Whether a folder is that of a run that has logged something."""
    return RunDirectory(path).metrics.is_file()


def runs_in(root: Path) -> list[Path]:
    """All run directories of a folder, by name."""
    return sorted(path for path in root.glob("*") if is_run(path))


def select_runs(words: Sequence[str], root: Path, where: Sequence[str] = ()) -> list[Path]:
    """Run directories that are meant, in the order of the words, each once.

    Args:
        words: names, directories, patterns, sweeps, MLflow ids; none: all runs below `root`.
        root: folder of the runs.
        where: conditions, all of which must hold.

    Raises:
        ValueError: a word or a condition matches nothing, or a condition is none.
    """
    everything = runs_in(root)
    found = [path for word in words for path in _resolve(word, root, everything)] if words else everything
    unique = list({path.resolve(): path for path in found}.values())
    conditions = [_parse(text) for text in where]
    return [path for path in unique if all(_holds(path, unique, condition) for condition in conditions)]


def _resolve(word: str, root: Path, everything: Sequence[Path]) -> list[Path]:
    for path in (Path(word), root / word):
        if is_run(path):
            return [path]
    if matches := [path for path in everything if fnmatchcase(path.name, word)]:
        return matches
    if matches := [path for path in everything if read_settings(path).get("tracking.parent") == word]:
        return matches
    if len(word) >= MIN_ID and (matches := [path for path in everything if _mlflow_id(path).startswith(word)]):
        return matches
    raise ValueError(f"there is no run {word!r}: {_known(word, root, everything)}")


def _known(word: str, root: Path, everything: Sequence[Path]) -> str:
    names = [path.name for path in everything]
    if not names:
        return f"--root {root} has no runs"
    if close := difflib.get_close_matches(word, names, n=1):
        return f"did you mean {close[0]!r}?"
    shown = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    return f"--root {root} has {shown}"


def _mlflow_id(path: Path) -> str:
    file = RunDirectory(path).mlflow_run_id
    return file.read_text(encoding="utf-8").strip() if file.is_file() else ""


def _parse(text: str) -> Condition:
    match = _CONDITION.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"--where {text}: KEY=VALUE is expected (also != < <= > >=), e.g. model.qsparse.sparsity=0.4")
    return Condition(match["key"], match["operator"], match["value"].strip())


def _holds(path: Path, runs: Sequence[Path], condition: Condition) -> bool:
    actual = _value(path, condition.key)
    if actual is None:
        known = {key for run in runs for key in _keys(run)}
        if condition.key not in known:
            close = difflib.get_close_matches(condition.key, known, n=1)
            hint = f", did you mean {close[0]!r}?" if close else "; keys of the configuration, metrics and state are"
            raise ValueError(f"--where {condition.key}: no run has it{hint}")
        return condition.operator == "!="
    try:
        return _COMPARISONS[condition.operator](float(actual), float(condition.value))
    except ValueError:
        if condition.operator in ("=", "!="):
            return (actual == condition.value) == (condition.operator == "=")
        raise ValueError(f"--where {condition.key}: {actual!r} of {path} is not a number to compare") from None


def _value(path: Path, key: str) -> str | None:
    if key == "state":
        status = RunDirectory(path).read_status()
        return str(status["state"]) if status else "unknown"
    if "/" in key:
        values = series(read_metrics(RunDirectory(path).metrics), key)[1]
        return repr(values[-1]) if values else None
    return read_settings(path).get(key)


def _keys(path: Path) -> set[str]:
    return {*read_settings(path), *(name for record in read_metrics(RunDirectory(path).metrics) for name in record)}
