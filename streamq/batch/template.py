"""Names of destinations: ``out/{org}/{name}-{scheme}``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from string import Formatter
from typing import Any

from streamq.errors import PlanError
from streamq.hub import is_hub, parse_hub

#: Characters of a path (PATH_MAX of Linux).
LONGEST = 4096
FIELDS = ("org", "name", "revision", "scheme", "format")


def check_template(template: str, where: str) -> None:
    """Raise PlanError for anything in braces but one of ``FIELDS``."""
    if not template.isprintable() or not 0 < len(template) <= LONGEST:
        raise PlanError(
            f"{where}: out must be a name of 1 to {LONGEST} characters, got {template[:80]!r}."
        )
    try:
        parts = list(Formatter().parse(template))
    except ValueError as e:
        raise PlanError(f"{where}: out {template!r}: {e}.") from None
    for _, field, form, conversion in parts:
        if field is not None and (field not in FIELDS or form or conversion):
            more = f"!{conversion}" if conversion else f":{form}" if form else ""
            raise PlanError(
                f"{where}: out {template!r} has {{{field}{more}}}; known are "
                f"{', '.join(f'{{{name}}}' for name in FIELDS)}."
            )


def values_of(src: str, how: Mapping[str, Any]) -> dict[str, str | None]:
    """What stands for the fields; None where the source has no such thing.

    Of a local source the last two parts of its path. A slash in a revision becomes a dash.
    """
    if is_hub(src):
        address = parse_hub(src)
        org, _, name = address.repo.partition("/")
        revision = (address.revision or "main").replace("/", "-")
    else:
        path = Path(os.path.abspath(src))
        path = path.with_suffix("") if path.suffix == ".safetensors" else path
        org, name, revision = path.parent.name, path.name, None
    recipe = how.get("recipe")
    scheme = how.get("scheme") or (Path(recipe).stem if recipe else None)
    return {
        "org": org or None, "name": name or None, "revision": revision,
        "scheme": scheme.lower() if scheme else None, "format": how.get("format") or _default(how),
    }  # fmt: skip


def _default(how: Mapping[str, Any]) -> str | None:
    """The format that a scheme has without one; a recipe may name its own."""
    from streamq.api import options
    from streamq.formats import default_format

    if how.get("recipe"):
        return None
    asked = options(how["scheme"])
    return (asked.format or default_format(asked.scheme)).name


def filled(template: str, values: Mapping[str, str | None], where: str) -> str:
    """The destination. Raises PlanError for a field that this source has no value for."""
    for _, field, _, _ in Formatter().parse(template):
        if field is not None and values[field] is None:
            raise PlanError(f"{where}: has no {{{field}}} for out {template!r}.")
    return template.format(**values)
