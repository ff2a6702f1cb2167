"""Scalars against a table written from YAML 1.2's core schema; round trips over arbitrary data."""

import math

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import yaml12

# (text, YAML 1.2 value, what PyYAML's own YAML 1.1 rules make of it)
SCALARS = [
    ("12:00:00", "12:00:00", 43200),
    ("3e-4", 3e-4, "3e-4"),
    ("1e6", 1e6, "1e6"),
    ("010", 10, 8),
    ("no", "no", False),
    ("on", "on", True),
    ("0x1F", "0x1F", 31),
    ("=", "=", None),
    ("-1_000", -1000, -1000),
    (".5", 0.5, 0.5),
    ("1.", 1.0, 1.0),
    ("true", True, True),
    ("~", None, None),
    ("", None, None),
    ("'1'", "1", "1"),
    ("2026-01-02x", "2026-01-02x", "2026-01-02x"),
]


@pytest.mark.parametrize(("text", "value", "yaml11"), SCALARS)
def test_scalars_are_those_of_yaml_12(text, value, yaml11):
    loaded = yaml12.load(f"key: {text}").data["key"]
    assert (type(loaded), loaded) == (type(value), value)
    if text != "=":
        assert yaml.safe_load(f"key: {text}")["key"] == yaml11


def test_dates_stay_text():
    assert yaml12.load("day: 2026-01-02").data == {"day": "2026-01-02"}


def test_infinities_and_nan():
    data = yaml12.load("[.inf, -.inf, .nan]").data
    assert data[:2] == [math.inf, -math.inf]
    assert math.isnan(data[2])


def test_lines_of_keys_and_entries():
    text = "# comment\nmodel:\n  rules:\n    - match: a\n    - match: b\n\nrun: {name: x}\n"
    assert yaml12.load(text).lines == {
        ("model",): 2,
        ("model", "rules"): 3,
        ("model", "rules", "0"): 4,
        ("model", "rules", "0", "match"): 4,
        ("model", "rules", "1"): 5,
        ("model", "rules", "1", "match"): 5,
        ("run",): 7,
        ("run", "name"): 7,
    }


def test_merge_keys_keep_the_line_of_the_anchor():
    document = yaml12.load("a: &a\n  x: 1\n  y: 2\nb:\n  <<: *a\n  y: 3\n")
    assert document.data["b"] == {"x": 1, "y": 3}
    assert (document.lines["b", "x"], document.lines["b", "y"]) == (2, 6)


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        (
            "a: 1\nb: 2\na: 3\nb: 4\n",
            [(3, "duplicate key 'a' (first at line 1)"), (4, "duplicate key 'b' (first at line 2)")],
        ),
        ("a: {x: 1, x: 2}", [(1, "duplicate key 'x' (first at line 1)")]),
        ("a: 1\n2: b\n", [(2, "key 2 is not a string: quote it")]),
        ("? [a]\n: 1\n", [(1, "key ? is not a string: quote it")]),
        ("a: 1\n b: 2\n", [(2, "mapping values are not allowed here")]),
        ("a: [1,\nb: 2\n", [(3, "did not find expected ',' or ']'")]),
        ("a: 1\nb: *c\n", [(2, "found undefined alias 'c'")]),
        ("a: &a\n  b: *a\n", [(1, "an alias contains itself")]),
        ("a: 1\nb: !!python/name:os.system x\n", [(2, None)]),
        ("a: 1\nb: \x07\n", [(2, None)]),
    ],
)
def test_errors_have_lines(text, problems):
    with pytest.raises(yaml12.YamlError) as error:
        yaml12.load(text)
    assert [line for line, _ in error.value.problems] == [line for line, _ in problems]
    for (_, message), (_, expected) in zip(error.value.problems, problems, strict=True):
        assert expected is None or message == expected or "expected" in message


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(), plain))
def test_dump_and_load_are_inverse(data):
    assert yaml12.load(yaml12.dump(data)).data == data


@pytest.mark.parametrize("text", ["12:00:00", "3e-4", "1e6", "010", "no", "0x1F", "2026-01-02", "true", "null", "1_0"])
def test_dumped_text_is_text_for_yaml_11_too(text):
    assert yaml.safe_load(yaml12.dump({"key": text})) == {"key": text}
