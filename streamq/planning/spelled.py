"""Options as JSON, and back: what a record of an output says of how it was made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any

from streamq.errors import CheckpointError, StreamqError
from streamq.families import ExpertLayout, FusedGroup
from streamq.formats import named
from streamq.recipe import Recipe, Rule
from streamq.schemes import Activation, Scheme

from .types import Options


def spelled(options: Options) -> dict[str, Any]:
    """The options of a plan that decide its bytes, as JSON."""
    o, fmt = options, options.format
    assert fmt is not None, "a plan has one"
    return {
        "scheme": _short(o.scheme), "format": {"name": fmt.name, **fmt.chosen},
        "ignore": list(o.ignore), "only": list(o.only), "numerics": o.numerics,
        "shard_size": o.shard_size, "input_scale": o.input_scale, "requantize": o.requantize,
        "recipe": None if o.recipe is None else _recipe(o.recipe),
    }  # fmt: skip


def unspelled(said: Mapping[str, Any]) -> Options:
    """The inverse of ``spelled``. Raises CheckpointError for what it does not write."""
    try:
        left = dict(said)
        fmt = dict(left.pop("format"))
        recipe = left.pop("recipe")
        return Options(
            scheme=_scheme(left.pop("scheme")), format=named(fmt.pop("name"), **fmt),
            ignore=tuple(left.pop("ignore")), only=tuple(left.pop("only")),
            recipe=None if recipe is None else _unrecipe(recipe), **left,
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError, StreamqError) as e:
        raise CheckpointError(f"the options of a record are not known here: {e}") from None


def _short(value: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not what they are by default."""
    found = asdict(value)
    return {f.name: found[f.name] for f in fields(value)
            if f.default is MISSING or getattr(value, f.name) != f.default}  # fmt: skip


def _scheme(said: Mapping[str, Any]) -> Scheme:
    activation = said.get("activation")
    more = {"activation": Activation(**activation)} if activation else {}
    return Scheme(**{**said, "block": tuple(said["block"]), **more})


def _recipe(recipe: Recipe) -> dict[str, Any]:
    return {
        "scheme": _short(recipe.scheme) if recipe.scheme else None,
        "format": recipe.format,
        "ignore": list(recipe.ignore),
        "rules": [{"patterns": list(r.patterns), "scheme": _short(r.scheme) if r.scheme else None}
                  for r in recipe.rules],
        "groups": [_short(row) for row in recipe.groups],
        "experts": [_short(row) for row in recipe.experts],
        "text": recipe.text,
    }  # fmt: skip


def _unrecipe(said: Mapping[str, Any]) -> Recipe:
    rules = tuple(
        Rule(number, tuple(r["patterns"]), _scheme(r["scheme"]) if r["scheme"] else None)
        for number, r in enumerate(said["rules"], 1)
    )
    return Recipe(
        rules, _scheme(said["scheme"]) if said["scheme"] else None, said["format"],
        tuple(said["ignore"]), tuple(FusedGroup(**_tuples(row)) for row in said["groups"]),
        tuple(ExpertLayout(**_tuples(row)) for row in said["experts"]), said["text"],
    )  # fmt: skip


def _tuples(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
