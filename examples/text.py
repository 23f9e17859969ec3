"""The text that the example is trained and measured on: the manual inside Python.

``pydoc_data.topics`` is what ``help()`` prints, about 0.7 MB. A tenth of its topics, chosen
by their names, is never trained on. Versions of Python differ in it a little, so compare
figures from one version only.
"""

from __future__ import annotations

from pydoc_data.topics import topics
from zlib import crc32

import numpy as np


def text(held_out: bool) -> np.ndarray:
    """All topics of one side, one after the other, as UTF-8; uint8 ``[bytes]``."""
    chosen = [
        topics[name] for name in sorted(topics) if (crc32(name.encode()) % 10 == 0) == held_out
    ]
    return np.frombuffer("\n\n".join(chosen).encode(), np.uint8)
