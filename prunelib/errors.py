"""Errors that a person is meant to read: one line each, with an exit code of its own.

Every step turns one of these into a single line on standard error.
"""


class PrunelibError(Exception):
    """Base of all errors raised on purpose; the message is one line.

    ``permanent``: running the same step again with the same input ends the same way, so that a
    retry can be spared. A full disk, or code that changed under a run, is not.
    """

    exit_code = 1
    permanent = False


class InputError(PrunelibError):
    """Bad input: what was given, what is allowed, and where (file and key)."""

    exit_code = 2
    permanent = True


class NonFiniteError(PrunelibError):
    """A loss, score or weight is NaN or infinite; the message names where."""

    exit_code = 3
    permanent = True


class IntegrityError(PrunelibError):
    """A file is not what its provenance says: wrong size, wrong sha256 or missing."""

    exit_code = 4
    permanent = True
