"""A bounded file for bytes that were fetched and are needed again."""

from __future__ import annotations

import os
from pathlib import Path

from streamq.errors import CheckpointError

from .blocks import BLOCK

#: Default of ``--spool``, in bytes: a fused group of most models, and some time between its parts.
SPOOL = 4 << 30


def spool_folder() -> Path:
    """Where spools are: ``TMPDIR``, or /var/tmp, which is on a disk where /tmp is in memory."""
    chosen = os.environ.get("TMPDIR")
    return Path(chosen or ("/var/tmp" if os.path.isdir("/var/tmp") else "/tmp"))


class Spool:
    """Slots of a block each in a file without a name, which goes with the process however it ends.

    ``slots``: as many as ``size`` bytes hold, and half of what is free there.
    """

    def __init__(self, size: int, folder: Path) -> None:
        import shutil  # these take 5 ms, and few runs need a spool
        import tempfile

        self.folder = folder
        self._fd = -1
        try:
            self.slots = min(size, shutil.disk_usage(folder).free // 2) // BLOCK
            if self.slots:
                self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
                self._fd = self._file.fileno()
        except OSError as e:
            raise CheckpointError(
                f"{folder}: cannot hold a spool: {e.strerror}; choose another --spool-dir."
            ) from e

    def write(self, slot: int, at: int, data: memoryview) -> None:
        """Put bytes at a place of a slot. Raises OSError."""
        done = 0
        while done < len(data):
            done += os.pwrite(self._fd, data[done:], slot * BLOCK + at + done)

    def read(self, slot: int, at: int, into: memoryview) -> None:
        """Fill a buffer from a place of a slot. Raises OSError."""
        done = 0
        while done < len(into):
            n = os.preadv(self._fd, [into[done:]], slot * BLOCK + at + done)
            if not n:
                raise OSError(0, "the spool is shorter than what was written")
            done += n

    def close(self) -> None:
        """Let go of the file."""
        if self._fd >= 0:
            self._file.close()
            self._fd = -1
