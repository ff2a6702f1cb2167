"""What a rule of `config_checks` yields, and what several rules need.  No torch here."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from pipeline.config import Config


class Violation(NamedTuple):
    """A combination of keys that cannot work."""

    keys: tuple[str, ...]
    """Dotted keys involved, the most telling one first."""
    message: str
    """What is wrong and what would be right, with `key=value` for each key."""


class Obstacle(NamedTuple):
    """A key that is in the way of another one."""

    is_one: bool
    instead: str
    """Value that would not be."""


def value_of(config: "Config", key: str) -> Any:
    """The value of a dotted key."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def obstructed(
    config: "Config", setting: str, off: str, obstacles: Mapping[str, Obstacle], *, why: str = "does not work with"
) -> Iterator[Violation]:
    """A violation for each obstacle.

    Args:
        config: the run.
        setting: `key=value` that wants something.
        off: value of that key which wants nothing.
        obstacles: by key.
        why: between the two.
    """
    key = setting.split("=")[0]
    for other, (is_one, instead) in obstacles.items():
        if is_one:
            message = f"{setting} {why} {other}={value_of(config, other)}: set {other}={instead} or {key}={off}"
            yield Violation((other, key), message)
