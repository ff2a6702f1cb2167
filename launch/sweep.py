"""Several runs out of one configuration: `--sweep KEY=A,B,C`, several of them make the product.

The values are cut at commas outside of brackets and quotes, so `optimizer.betas=[0.9,0.95],[0.9,0.99]` are two.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """One run of a sweep.

    Attributes:
        suffix: what is added to the run's name; empty where there is no sweep.
        overrides: `KEY=VALUE` that make this run different.
    """

    suffix: str
    overrides: tuple[str, ...]


def variants(sweeps: Sequence[str]) -> list[Variant]:
    """All combinations; one without overrides if `sweeps` is empty.

    Raises:
        ValueError: a sweep is not KEY=VALUE,VALUE..., repeats a key, or two runs would have the same name.
    """
    axes = [_axis(sweep) for sweep in sweeps]
    keys = [key for key, _ in axes]
    if repeated := {key for key in keys if keys.count(key) > 1}:
        raise ValueError(f"--sweep {sorted(repeated)[0]} is given twice; put all values into one")
    found = []
    for values in itertools.product(*(values for _, values in axes)):
        parts = [f"-{key.rpartition('.')[2]}-{_for_name(value)}" for key, value in zip(keys, values, strict=True)]
        overrides = (f"{key}={value}" for key, value in zip(keys, values, strict=True))
        found.append(Variant("".join(parts), tuple(overrides)))
    names = [variant.suffix for variant in found]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--sweep makes two runs of the name ...{name}; leave one of the values out")
    return found


def _axis(sweep: str) -> tuple[str, list[str]]:
    key, equals, text = sweep.partition("=")
    values = _split(text)
    if not equals or not key or not all(values):
        raise ValueError(f"--sweep {sweep}: KEY=VALUE,VALUE... is expected, e.g. model.qsparse.sparsity=0.0,0.4,0.6")
    if key == "run.name":
        raise ValueError(f"--sweep {sweep}: runs of a sweep are named by what differs; sweep another key")
    return key, values


def _split(text: str) -> list[str]:
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        depth += (character in "[{") - (character in "]}") if not quote else 0
        if character == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _for_name(value: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", value).strip("-") or "x"
