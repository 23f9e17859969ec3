"""Mutations of JSON as a value: bytes alone rarely make another object that can be parsed."""

from __future__ import annotations

import json
import random
from typing import Any

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 4, 8, 16, 32, 64, 128, 2**31, 2**63, 2**64, 10**30, 0.5,
    -0.0, float("nan"), float("inf"), "", "x", "re:(", "re:.*", "re:a{9999999999}", "Linear",
    "lm_head", "*", "[", "\ud800", "a\nb", "../x.safetensors", [], [[]], {}, {"": None}, ["Linear"],
    [None],
]  # fmt: skip

Place = tuple[Any, Any]


def mutated(raw: bytes, rng: random.Random, found: set[str]) -> bytes | None:
    """JSON with a value or two exchanged, put in, taken out or repeated; None if it is none.

    ``found``: words of earlier inputs, which grow; one of them is a value now and then.
    """
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    for _ in range(rng.randint(1, 3)):
        places = list(_places(value))
        found.update(str(key) for _, key in places if len(found) < 1000)
        found.update(v for h, k in places if isinstance(v := h[k], str) and len(found) < 1000)
        if not places:
            return json.dumps(_odd(rng, found)).encode()
        holder, key = rng.choice(places)
        match rng.randrange(5):
            case 0:
                holder[key] = _odd(rng, found)
            case 1:
                other, at = rng.choice(places)
                holder[key] = json.loads(json.dumps(other[at]))
            case 2 if isinstance(holder, dict):
                holder[str(_odd(rng, found))] = holder.pop(key)
            case 3:
                del holder[key]
                if not holder:
                    break
            case _:
                holder[key] = [holder[key]] if rng.random() < 0.5 else {"x": holder[key]}
    return json.dumps(value, ensure_ascii=rng.random() < 0.5).encode(errors="replace")


def _odd(rng: random.Random, found: set[str]) -> Any:
    return rng.choice(sorted(found) if found and rng.random() < 0.5 else ODD)


def _places(value: Any) -> list[Place]:
    """Every holder with a key, breadth first."""
    places: list[Place] = []
    level = [value] if isinstance(value, dict | list) else []
    while level:
        deeper = []
        for holder in level:
            keys = holder if isinstance(holder, dict) else range(len(holder))
            for key in keys:
                places.append((holder, key))
                if isinstance(holder[key], dict | list):
                    deeper.append(holder[key])
        level = deeper
    return places
