"""From YAML files and `a.b=c` overrides to a validated `Config`, and back.

    recipe.yaml         defaults: base.yaml           files named by `defaults` come first, the file's own keys win;
                        model: {num_layers: 8}        lists replace, mappings merge
    command line        model.num_layers=12           overrides come last; the value is YAML, `key=null` unsets

Everything is merged before it is validated, so an override is checked like a line of a file.  Each value remembers
where it was set, so every error carries `file:line` or the override's text, all errors are reported together, and an
unknown key comes with the key that was probably meant.  The price is that checks which tie keys together run only
once each key is right by itself.
"""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pipeline import yaml12
from pipeline.config import Config
from pipeline.config_checks import VIOLATION_TYPE
from pipeline.yaml12 import KeyPath

SCHEMA_LINE = "# yaml-language-server: $schema="
_DEFAULTS = "defaults"


class ConfigError(ValueError):
    """A configuration that cannot be used; the message lists every reason with its place."""

    def __init__(self, problems: Sequence[str]) -> None:
        count = "1 error" if len(problems) == 1 else f"{len(problems)} errors"
        super().__init__(f"{count} in the configuration:\n" + "\n".join(f"  {problem}" for problem in problems))
        self.problems = tuple(problems)


class _Tree:
    """Merged data and, for each of its keys, the place that set it."""

    def __init__(self, data: dict[str, Any] | None = None, sources: dict[KeyPath, str] | None = None) -> None:
        self.data = data or {}
        self.sources = sources or {}

    def merge(self, other: "_Tree") -> None:
        """Put `other` on top: its mappings merge into ours, its other values replace ours."""
        self._merge(self.data, other.data, ())
        self.sources |= other.sources

    def _merge(self, into: dict[str, Any], data: dict[str, Any], path: KeyPath) -> None:
        for key, value in data.items():
            here = (*path, key)
            if not (isinstance(value, dict) and isinstance(into.get(key), dict)):
                for stale in [known for known in self.sources if known[: len(here)] == here]:
                    del self.sources[stale]
                # A mapping is copied key by key: behind a YAML alias, two keys share one object.
                into[key] = {} if isinstance(value, dict) else value
            if isinstance(value, dict):
                self._merge(into[key], value, here)


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of `path` (absent: the defaults) with `overrides` (`section.key=value`) on top.

    Raises:
        ConfigError: A file, an override or the resulting configuration is wrong; the message lists all reasons.
    """
    problems: list[str] = []
    tree = _Tree()
    if path is not None:
        files: dict[Path, _Tree] = {}
        _read_files(Path(path), (), files, problems)
        for file in files.values():
            tree.merge(file)
    for override in overrides:
        _merge_override(tree, override, problems)
    try:
        config = Config.model_validate(tree.data)
    except ValidationError as error:
        # A file or override that was left out makes combinations wrong that may be right.
        details = [item for item in error.errors() if not (problems and item["type"] == VIOLATION_TYPE)]
        problems += [_describe(item, tree, str(path or "defaults")) for item in details]
        raise ConfigError(problems) from None
    if problems:
        raise ConfigError(problems)
    return config


def dump_config(config: Config) -> str:
    """YAML with every key of `config`; `load_config` reads an equal configuration from it."""
    return yaml12.dump(config.model_dump(mode="json"))


def differences(config: Config, base: Config | None = None) -> list[tuple[str, Any, Any]]:
    """(dotted key, value in `base`, value in `config`) wherever they differ; `base` absent: the defaults.

    A key of an absent section counts as None.
    """
    old, new = (dict(_flatten(c.model_dump(mode="json"))) for c in (base or Config(), config))
    keys = [*new, *(key for key in old if key not in new)]
    return [(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]


def json_schema() -> dict[str, Any]:
    """JSON schema of a configuration file, for completion and checks in editors."""
    schema = Config.model_json_schema()
    file = {"type": "string"}
    description = "File or files, relative to this one, whose keys this file inherits; the last one wins."
    inherited = {_DEFAULTS: {"description": description, "anyOf": [file, {"type": "array", "items": file}]}}
    schema["properties"] = inherited | schema["properties"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _flatten(data: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read_files(path: Path, chain: tuple[Path, ...], files: dict[Path, _Tree], problems: list[str]) -> None:
    """Append `path`, after the files that it inherits from, to `files`; a file inherited twice counts once."""
    resolved = path.resolve()
    if resolved in files:
        return
    try:
        document = yaml12.load(path.read_text(encoding="utf-8"))
    except yaml12.YamlError as error:
        problems += [f"{path}:{line}: {message}" for line, message in error.problems]
        return
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        problems.append(f"{path}: cannot be read: {reason}")
        return
    if not isinstance(document.data, dict | None):
        problems.append(f"{path}:1: expected sections with keys, found {type(document.data).__name__}")
        return
    data = document.data or {}
    place = f"{path}:{document.lines.get((_DEFAULTS,), 1)}: {_DEFAULTS}"
    for parent in _parents(path, data.pop(_DEFAULTS, []), place, problems):
        trail = (*chain, path)
        if parent.resolve() in [file.resolve() for file in trail]:
            problems.append(f"{place}: files inherit from each other: {' -> '.join(map(str, (*trail, parent)))}")
        elif not parent.is_file():
            problems.append(f"{place}: {parent} does not exist")
        else:
            _read_files(parent, trail, files, problems)
    files[resolved] = _Tree(data, {key: f"{path}:{line}" for key, line in document.lines.items()})


def _parents(path: Path, value: Any, place: str, problems: list[str]) -> list[Path]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        problems.append(f"{place}: expected a file or a list of files relative to this one, got {value!r}")
        return []
    return [path.parent / name for name in names]


def _merge_override(tree: _Tree, override: str, problems: list[str]) -> None:
    place = f"override {override!r}"
    dotted, equals, text = override.partition("=")
    keys = tuple(dotted.strip().split("."))
    if not equals or not all(keys):
        problems.append(f"{place}: expected section.key=value, e.g. model.num_layers=8")
        return
    try:
        document = yaml12.load(text)
    except yaml12.YamlError as error:
        problems += [f"{place}: {message}" for _, message in error.problems]
        return
    data: Any = document.data
    for key in reversed(keys):
        data = {key: data}
    # Sections on the way keep their line; only what the override sets is its own.
    tree.merge(_Tree(data, {keys: place} | {(*keys, *key): place for key in document.lines}))


def _describe(error: ErrorDetails, tree: _Tree, fallback: str) -> str:
    """One line of the report: place, key, and what is wrong with it."""
    if error["type"] == VIOLATION_TYPE:
        paths = [tuple(key.split(".")) for key in error["ctx"]["keys"]]
        places = list(dict.fromkeys(tree.sources[path] for path in paths if path in tree.sources))
        return f"{' and '.join(places) or fallback}: {error['msg']}"
    location = tuple(map(str, error["loc"]))
    return f"{_place(location, tree.sources) or fallback}: {_dotted(location)}: {_explain(error, location)}"


def _place(location: KeyPath, sources: dict[KeyPath, str]) -> str | None:
    """Where `location` was set: itself, else a key below it, else the section around it."""
    below = (source for path, source in sources.items() if path[: len(location)] == location)
    around = (sources[location[:length]] for length in range(len(location), 0, -1) if location[:length] in sources)
    return sources.get(location) or next(below, None) or next(around, None)


def _explain(error: ErrorDetails, location: KeyPath) -> str:
    if error["type"] == "extra_forbidden":
        return f"unknown key{_suggestion(location)}"
    return explain_value(error)


def explain_value(error: ErrorDetails) -> str:
    """What is wrong with the value of a known key, and what it was."""
    match error["type"]:
        case "model_type" | "model_attributes_type":
            return f"expected a section with keys, got {error['input']!r}"
        case "value_error":
            return error["msg"].removeprefix("Value error, ")
        case "string_type" if isinstance(error["input"], int | float):
            return f"expected text, got the number {error['input']!r}: put it in quotes"
        case _:
            message = error["msg"][0].lower() + error["msg"][1:]
            return f"{message} (got {error['input']!r})"


def _suggestion(location: KeyPath) -> str:
    """A slip of the pen in the same section, the same name elsewhere, something similar here, or all keys here."""
    *parents, unknown = location
    section = _section_at(parents)
    names = list(section.model_fields) if section else []
    slips, similar = (difflib.get_close_matches(unknown, names, n=1, cutoff=cutoff) for cutoff in (0.8, 0.6))
    elsewhere = sorted((path for path in _all_keys(Config) if path[-1] == unknown), key=len)
    meant = [(*parents, name) for name in slips] or elsewhere or [(*parents, name) for name in similar]
    if not meant:
        return f"; valid keys here: {', '.join(names)}"
    return f", did you mean {' or '.join(repr(_dotted(path)) for path in meant)}?"


def _section_at(path: Sequence[str]) -> type[BaseModel] | None:
    section: type[BaseModel] | None = Config
    for key in path:
        if section is not None and not key.isdecimal():
            section = _section_of(section.model_fields[key].annotation)
    return section


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class inside `Section`, `Section | None` or `tuple[Section, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((section for argument in get_args(annotation) if (section := _section_of(argument))), None)


def _all_keys(section: type[BaseModel], prefix: KeyPath = ()) -> Iterator[KeyPath]:
    for name, field in section.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is None:
            yield (*prefix, name)
        elif get_args(field.annotation)[1:] != (...,):
            yield from _all_keys(inner, (*prefix, name))


def _dotted(path: KeyPath) -> str:
    return "".join(f"[{key}]" if key.isdecimal() else f".{key}" for key in path).removeprefix(".")
