"""Errors that end a run on all ranks together, so that they are told once and nobody waits for a rank that is gone.

A rank that finds a damaged shard and simply raises leaves the others in their next collective, until a time-out of
minutes or a launcher that kills them, records unfinished.  `pipeline.world.agreement` and the flag in the learner's
all-reduce turn such a finding into one of these errors on every rank.
"""


class AgreedError(Exception):
    """Raised on every rank at the same point with the same message."""


class UserError(AgreedError, ValueError):
    """A mistake in configuration, data or checkpoints; starting again would not help."""


class NonFiniteError(AgreedError):
    """Loss, gradient norm or weights are not numbers; names step, rank and samples."""


class DeviceMemoryError(MemoryError):
    """A GPU's memory did not suffice on this rank; says what would take less."""
