"""The Hugging Face Hub: addresses, the client, what its errors mean; nothing of checkpoints.

huggingface_hub is imported by the functions that talk to the Hub and not before, and so is what
only they need: runs on local files do not pay for it.
"""

from .address import HubPath, is_branch, is_hub, parse_hub
from .branch import MAIN, Branch, Committed
from .client import Again, Stop, api, endpoint, patiently, pause_before, translated
from .files import Sum, upload_memory
from .repository import Repository

__all__ = [
    "MAIN", "Again", "Branch", "Committed", "HubPath", "Repository", "Stop", "Sum", "api",
    "endpoint", "is_branch", "is_hub", "parse_hub", "patiently", "pause_before", "translated",
    "upload_memory",
]  # fmt: skip
