"""Errors of the data room: one sentence each, naming the file or argument, what it must be, and what came."""

__all__ = ["CorruptData", "DataError", "MissingData", "MissingPart"]


class DataError(ValueError):
    """A data set that cannot be used as asked."""


class MissingData(DataError):
    """A file that is not where it was looked for; the message says how to get it."""


class MissingPart(MissingData, AttributeError):
    """A part (train, valid, test) that a data set does not have.

    An ``AttributeError`` as well, so that ``hasattr(data, "valid")`` answers the question.
    """


class CorruptData(DataError):
    """A file or tensor that is truncated, damaged, or not of the shape, type or range that was promised."""
