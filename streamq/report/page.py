"""One HTML file with everything in it: data, charts, and the code that draws them."""

from __future__ import annotations

import json
import os
import re
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from streamq.errors import PlanError, WriteError

from .charts import METRICS, charts
from .fold import page_data

#: Of the Vega-Lite that the charts are written for; vl-convert brings several.
VEGA_LITE = "6.1"


def check_target(path: Path) -> None:
    """Raise PlanError where a page could not be made, or not be written to ``path``."""
    if path.suffix != ".json":
        _converter()
    if path.is_dir():
        raise PlanError(f"{path} is a directory; name a file for the report.")
    if not path.absolute().parent.is_dir():
        raise PlanError(f"{path.parent} is no directory; make it before the report goes there.")
    if not os.access(path.absolute().parent, os.W_OK):
        raise PlanError(f"{path.parent} is not writable; choose another place for the report.")


def write(path: Path, report: dict[str, Any]) -> None:
    """Write a document as a page, or as it is if ``path`` ends in .json; whole or not at all.

    Raises WriteError.
    """
    text = as_json(report) if path.suffix == ".json" else page(report)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as e:
        partial.unlink(missing_ok=True)
        raise WriteError(f"{path}: the report cannot be written: {e.strerror}.") from e


def as_json(report: dict[str, Any]) -> str:
    """A document as text."""
    return json.dumps(report, indent=1, allow_nan=False) + "\n"


def page(report: dict[str, Any]) -> str:
    """A document as one HTML file that loads nothing from anywhere.

    Its policy forbids the browser to. What a checkpoint says stands in one block of JSON
    without a ``<``, and the script puts it into the page as text only.
    """
    data = page_data(report)
    data["charts"] = charts(data)
    data["metrics"] = {name: title for name, (title, *_) in METRICS.items()}
    here = files("streamq.report")
    parts = {name: here.joinpath(f"page.{name}").read_text("utf-8") for name in ("css", "js")}
    parts |= {
        "title": _text(data["name"]), "data": embedded(data),
        "vega": re.sub("</(script)", r"<\\/\1", _library(), flags=re.IGNORECASE),
    }  # fmt: skip
    form = here.joinpath("page.html").read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], form)


def embedded(data: Any) -> str:
    """JSON that may stand in a script element whatever strings it has."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _text(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _converter() -> Any:
    try:
        import vl_convert
    except ImportError:
        raise PlanError(
            "a report needs Vega-Lite, which is not installed: pip install 'streamq[report]'."
        ) from None
    return vl_convert


@cache
def _library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, which takes 3 seconds to put together."""
    return str(_converter().javascript_bundle(vl_version=VEGA_LITE))
