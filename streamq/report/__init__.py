"""The quality report: what became of a checkpoint, as one HTML page or as JSON."""

from .document import SCHEMA, Told, document
from .page import as_json, check_target, page, write
from .pairs import Pair, measure, pairs_of

__all__ = [
    "SCHEMA", "Pair", "Told", "as_json", "check_target", "document", "measure", "page",
    "pairs_of", "write",
]  # fmt: skip
