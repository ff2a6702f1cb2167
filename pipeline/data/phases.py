"""What holds at which sample: weights of the sources, sequence length, batch size.

A phase begins at a sample number, whatever the configuration says it by, because sample numbers are the one axis that
no layout changes.  `from_step` is converted with the batch sizes before it; `from_tokens` with the sequence lengths.
So weights may change in the middle of a batch, and the same tokens come in the same order if the batch size is another
one; a change of length or batch size waits for the end of the step it falls into.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.config import Config, PhaseConfig


@dataclass(frozen=True)
class Phase:
    """A stretch of samples under the same settings."""

    first_sample: int
    first_token: int
    """Tokens trained on before `first_sample`."""
    weights: tuple[float, ...]
    """One per source."""
    seq_length: int
    global_batch_size: int


class PhaseError(ValueError):
    """Phases that cannot be followed; `keys` are dotted, for pointing to their lines."""

    def __init__(self, message: str, *keys: str) -> None:
        super().__init__(message)
        self.keys = keys


class Phases:
    """The phases of a run, in order; the first begins at sample 0.

    Args:
        phases: as resolved.
    """

    def __init__(self, phases: Sequence[Phase]) -> None:
        self.all = tuple(phases)
        self._starts = [phase.first_sample for phase in phases]

    def at(self, sample: int) -> Phase:
        """The phase that a sample belongs to."""
        return self.all[bisect_right(self._starts, sample) - 1]

    def tokens(self, samples: int) -> int:
        """Tokens of the first `samples` samples."""
        phase = self.at(samples)
        return phase.first_token + (samples - phase.first_sample) * phase.seq_length

    def samples_after(self, steps: int, *, start: int = 0) -> int:
        """Samples consumed `steps` optimizer steps after sample `start`."""
        sample = start
        while steps:
            index = bisect_right(self._starts, sample) - 1
            size = self.all[index].global_batch_size
            until = self._starts[index + 1] if index + 1 < len(self.all) else None
            here = steps if until is None else min(steps, -(-(until - sample) // size))
            sample += here * size
            steps -= here
        return sample

    def check_steps_from(self, sample: int) -> None:
        """Whether steps that go on from `sample` meet every change of length or batch size.

        Raises:
            PhaseError: a step would reach over one: the batch size was another one when the phases were planned.
        """
        for before, after in zip(self.all, self.all[1:], strict=False):
            size, left = before.global_batch_size, after.first_sample - sample
            if left <= 0:
                continue
            changes = (before.seq_length, size) != (after.seq_length, after.global_batch_size)
            if changes and left % size:
                raise PhaseError(
                    f"data.phases: the change of length or batch size at sample {after.first_sample} lies inside a "
                    f"step: steps of {size} samples go on from sample {sample}; restore training.global_batch_size",
                    "data.phases",
                )
            sample += -(-left // size) * size


def resolve_phases(config: "Config") -> Phases:
    """The phases of a configuration.

    Raises:
        PhaseError: a phase has no beginning or two, begins before the one before it, or has other weights than sources.
    """
    training, sources = config.training, config.data.all_sources
    weights = tuple(source.weight for source in sources)
    phases = [_checked_weights(Phase(0, 0, weights, training.seq_length, training.global_batch_size), "data.sources")]
    anchor_sample, anchor_step = 0, 0  # where the current batch size began
    for number, given in enumerate(config.data.phases):
        key, last = f"data.phases.{number}", phases[-1]
        length = given.seq_length or training.seq_length
        size = given.global_batch_size or training.global_batch_size
        waits = (length, size) != (last.seq_length, last.global_batch_size)
        first = _first_sample(given, key, last, anchor_sample, anchor_step, whole_steps=waits)
        token = last.first_token + (first - last.first_sample) * last.seq_length
        phase = Phase(first, token, weights if given.weights is None else given.weights, length, size)
        if len(phase.weights) != len(sources):
            raise PhaseError(
                f"{key}.weights has {len(phase.weights)} numbers for {len(sources)} data.sources", f"{key}.weights"
            )
        if first < last.first_sample or (first == last.first_sample and number):
            raise PhaseError(f"{key} begins at sample {first}, not after the phase before it", key)
        if phase.global_batch_size != last.global_batch_size:
            anchor_step += (first - anchor_sample) // last.global_batch_size
            anchor_sample = first
        if first == 0:
            phases.clear()
        phases.append(_checked_weights(phase, f"{key}.weights"))
    return Phases(phases)


def _first_sample(
    given: "PhaseConfig", key: str, last: Phase, anchor_sample: int, anchor_step: int, *, whole_steps: bool
) -> int:
    size = last.global_batch_size
    if (given.from_step is None) == (given.from_tokens is None):
        raise PhaseError(f"{key} needs from_step or from_tokens, one of them", key)
    if given.from_step is not None:
        return anchor_sample + (given.from_step - anchor_step) * size
    assert given.from_tokens is not None
    first = last.first_sample + -(-(given.from_tokens - last.first_token) // last.seq_length)
    if whole_steps:
        first = anchor_sample + -(-(first - anchor_sample) // size) * size
    return first


def _checked_weights(phase: Phase, key: str) -> Phase:
    if not sum(phase.weights):
        raise PhaseError(f"{key}: all weights are 0, at least one source must have a share", key)
    return phase
