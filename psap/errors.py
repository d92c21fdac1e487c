"""The errors of psap: all derive from PsapError; argument mistakes are also builtin errors."""

from __future__ import annotations


class PsapError(Exception):
    """Base of all errors raised by psap. The message says what is wrong and what to do."""


class ArgumentError(PsapError, ValueError):
    """An argument has a value that cannot be used."""


class ArgumentTypeError(PsapError, TypeError):
    """An argument has a type that cannot be used."""


class FileError(PsapError):
    """A file cannot be read or written, or does not hold what it should."""


class TraceError(PsapError):
    """The model could not be run for tracing, or its channels could not be followed."""


class TargetError(PsapError, ValueError):
    """The compression target cannot be met by this model."""


class VerificationError(PsapError):
    """The small network does not compute what the masked dense network computes."""


class StateError(PsapError, RuntimeError):
    """A call came in a state that does not allow it (for example ``finish()`` twice)."""


class PsapWarning(UserWarning):
    """What was asked for was done, but probably not what was meant. Says what to do instead."""
