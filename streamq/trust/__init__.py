"""What makes an output trustworthy: checksums of what is written, a journal, a record of origin.

Files and plain values only; what options mean and how bytes come about is known above.
"""

from .checksums import BLOCK, Running, Sums, block_sum, blocks_of, crc32
from .fingerprint import contents, differences, fingerprint, without_times
from .journal import Journal, read_journal
from .record import RECORD, VERSION, FileSum, Record, parse_record, record_text

__all__ = [
    "BLOCK", "RECORD", "VERSION", "FileSum", "Journal", "Record", "Running", "Sums", "block_sum",
    "blocks_of", "contents", "crc32", "differences", "fingerprint", "parse_record", "read_journal",
    "record_text", "without_times",
]  # fmt: skip
