"""The errors of the data side: what the user can fix in a file, a shard or a flag, and what training can go around."""


class DataError(ValueError):
    """A source, shard or dataset is not what it has to be; the message names file, member, offset and the way out."""


class BadChunkError(DataError):
    """One chunk is damaged or cannot be read; under `data.bad_shard: skip` other windows take its place."""
