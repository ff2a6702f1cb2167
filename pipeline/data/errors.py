"""The one error of the data side: something the user can fix in a file, a shard or a flag."""


class DataError(ValueError):
    """A source, shard or dataset is not what it has to be; the message names file, member, offset and the way out."""
