"""Everything that streamq raises on purpose.

Each message is one sentence that names the tensor or file, what was expected and,
where there is something to do about it, what to do next. The command line turns a
StreamqError into exit code ``exit_code`` and never shows a traceback for one.
"""

from __future__ import annotations


class StreamqError(Exception):
    """Base of all expected failures.

    ``transient``: the same may well succeed the next time, without anybody changing anything.
    """

    exit_code = 1
    transient = False


class CheckpointError(StreamqError):
    """The source cannot be read as a checkpoint."""


class AddressError(StreamqError):
    """An address of the Hub that is none."""

    exit_code = 2


class HubError(StreamqError):
    """The Hub cannot be reached, refuses, or does not have what was asked for."""


class PlanError(StreamqError):
    """The conversion that was asked for cannot be done; found before any byte is written."""


class WriteError(StreamqError):
    """The destination could not be written."""


class VerifyError(StreamqError):
    """The output is not what it should be; the message lists what failed."""

    exit_code = 3


class DeviceError(StreamqError):
    """A device cannot be used, or has no kernel for what was asked of it."""


class Stopped(Exception):
    """Another thread failed, or the user interrupted: nobody wants the result any more."""


class NonFiniteError(StreamqError):
    """A weight or a scale is NaN or infinite.

    Kernels see arrays only, so they raise this with the position inside the array they
    were given; the caller, who knows names, says which tensor it was.
    """

    def __init__(self, what: str, row: int, col: int) -> None:
        super().__init__(f"{what} at row {row}, column {col} is not finite")
        self.what, self.row, self.col = what, row, col
