"""YAML 1.2 scalars through PyYAML, with the line of every key, and no duplicate keys.

PyYAML reads YAML 1.1: `12:00:00` is 43200, `3e-4` and `1e6` are strings, `010` is 8, `no` is False, a date is a date,
and the last of two equal keys silently wins.  The loader below keeps PyYAML's parser and replaces the table that
tells a scalar's type by that of YAML 1.2's core schema (decimal integers and floats, `true`, `false`, `null`; the rest
are strings).  The dumper quotes whatever either version would not read back as a string.  Against a YAML 1.2 library
this costs thirty lines and saves a dependency.  Deviations: `1_000` is an integer, hexadecimal and octal are strings.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml

KeyPath = tuple[str, ...]
"""Keys from the root to a value; list positions are decimal strings."""

_TAG = "tag:yaml.org,2002:"
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^[-+]?\d[\d_]*$")
_FLOAT = re.compile(
    r"""^[-+]?(?:\d[\d_]*(?:\.[\d_]*)?|\.\d[\d_]*)(?:[eE][-+]?\d+)?$
       |^[-+]?\.(?:inf|Inf|INF)$
       |^\.(?:nan|NaN|NAN)$""",
    re.VERBOSE,
)
_CORE_SCHEMA = (("bool", _BOOL, "tTfF"), ("int", _INT, "-+0123456789"), ("float", _FLOAT, "-+.0123456789"))


class YamlError(ValueError):
    """Text that is not YAML as this project understands it; `problems` holds (line from 1, message) pairs."""

    def __init__(self, *problems: tuple[int, str]) -> None:
        super().__init__("\n".join(f"line {line}: {message}" for line, message in problems))
        self.problems = problems


class Document(NamedTuple):
    """A parsed YAML text."""

    data: Any
    lines: dict[KeyPath, int]
    """Line (from 1) of each key and list entry."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalar types of YAML 1.2."""

    yaml_implicit_resolvers = {  # noqa: RUF012  (PyYAML's own protocol: a class attribute, copied on write)
        first: [(tag, pattern) for tag, pattern in resolvers if tag in (_TAG + "null", _TAG + "merge")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes strings which YAML 1.1 or 1.2 would take for something else."""


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    # SafeLoader's own would take a leading zero for octal.
    return int(loader.construct_scalar(node).replace("_", ""))


for _name, _pattern, _first in _CORE_SCHEMA:
    _Loader.add_implicit_resolver(_TAG + _name, _pattern, list(_first))
    _Dumper.add_implicit_resolver(_TAG + _name, _pattern, list(_first))
_Loader.add_constructor(_TAG + "int", _construct_int)


def load(text: str) -> Document:
    """Parse `text`.

    Raises:
        YamlError: Syntax errors, duplicate keys, keys that are not strings, aliases that contain themselves.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        lines: dict[KeyPath, int] = {}
        if problems := [] if node is None else list(_scan(node, (), (), lines)):
            raise YamlError(*problems)
        return Document(None if node is None else loader.construct_document(node), lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError((mark.line + 1 if mark else 1, error.problem or error.context or "syntax error")) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError((line, f"character {error.character!r} is not allowed")) from None


def dump(data: Any) -> str:
    """YAML text of plain data, keys in the given order; `load` gives the same data back."""
    # Escaped, not raw, beyond ASCII: PyYAML writes U+0085 raw and reads it back as a line break.
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=120)


def _scan(
    node: yaml.Node, path: KeyPath, ancestors: tuple[yaml.Node, ...], lines: dict[KeyPath, int]
) -> Iterator[tuple[int, str]]:
    """Fill `lines` with the positions below `node`; yield (line, message) for each problem."""
    if any(node is ancestor for ancestor in ancestors):
        yield node.start_mark.line + 1, "an alias contains itself"
    elif isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            lines[(*path, str(i))] = item.start_mark.line + 1
            yield from _scan(item, (*path, str(i)), (*ancestors, node), lines)
    elif isinstance(node, yaml.MappingNode):
        yield from _scan_mapping(node, path, ancestors, lines)


def _scan_mapping(
    node: yaml.MappingNode, path: KeyPath, ancestors: tuple[yaml.Node, ...], lines: dict[KeyPath, int]
) -> Iterator[tuple[int, str]]:
    # Merged keys (`<<: *base`) first: the mapping's own keys replace them.
    for key, value in node.value:
        if key.tag == _TAG + "merge":
            for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                yield from _scan(merged, path, (*ancestors, node), lines)
    seen: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.tag == _TAG + "merge":
            continue
        if not isinstance(key, yaml.ScalarNode) or key.tag != _TAG + "str":
            yield line, f"key {key.value if isinstance(key, yaml.ScalarNode) else '?'} is not a string: quote it"
            continue
        if key.value in seen:
            yield line, f"duplicate key {key.value!r} (first at line {seen[key.value]})"
            continue
        seen[key.value] = line
        lines[(*path, key.value)] = line
        yield from _scan(value, (*path, key.value), (*ancestors, node), lines)
