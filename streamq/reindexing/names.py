"""Names that change: of tensors by ``--rename``, and of modules in what the config says."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from streamq.errors import PlanError

#: Where a config speaks of modules.
_PLACES = ("quantization_config", "compression_config", "quantization")
#: In the name of a module that lies in one of many layers.
_LAYER = re.compile(r"\.\d+\.")


def renamed(names: list[str], rules: tuple[tuple[str, str], ...]) -> list[str]:
    """The names after every rule in turn. Raises PlanError where two tensors get one name."""
    new = names
    for pattern, to in rules:
        regex = re.compile(pattern)
        new = [regex.sub(to, name) for name in new]
    owners: dict[str, str] = {}
    for old, name in zip(names, new, strict=True):
        if not name:
            raise PlanError(f"--rename leaves nothing of the name of tensor {old!r}.")
        other = owners.setdefault(name, old)
        if other is not old:
            raise PlanError(
                f"tensors {other!r} and {old!r} would both be {name!r}; use another --rename."
            )
    return new


def moved_modules(old: Iterable[str], new: Iterable[str]) -> dict[str, list[str]]:
    """Modules and what holds them whose tensors all changed in the same way, with their names."""
    found: dict[str, str | None] = {}
    for a, b in zip(old, new, strict=True):
        left, right = a.split("."), b.split(".")
        while len(left) > 1 and len(right) > 1 and left.pop() == right.pop():
            one, other = ".".join(left), ".".join(right)
            if found.setdefault(one, other) != other:
                found[one] = None
    return {a: [b] for a, b in found.items() if b is not None and a != b}


def respelled(config: dict[str, Any], became: Mapping[str, list[str]]) -> dict[str, Any]:
    """A config with the new names of modules where it speaks of quantization.

    Exact names alone, as streamq's formats spell them; patterns are left as they are.
    """
    if not became:
        return config
    table = _spellings(became)

    def value_of(value: Any) -> Any:
        if isinstance(value, dict):
            keys: dict[str, Any] = {}
            for key, inner in value.items():
                for name in table.get(key, [key]):
                    keys[name] = value_of(inner)
            return keys
        if isinstance(value, list):
            if not all(isinstance(item, str) for item in value):
                return [value_of(item) for item in value]
            return list(dict.fromkeys(n for item in value for n in table.get(item, [item])))
        return value

    out = {k: value_of(v) if k in _PLACES else v for k, v in config.items()}
    text = config.get("text_config")
    if isinstance(text, dict):
        out["text_config"] = {k: value_of(v) if k in _PLACES else v for k, v in text.items()}
    return out


def _spellings(became: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Every way in which a config spells a module that changed, with the new ones."""
    table: dict[str, list[str]] = {}
    short: dict[str, list[str]] = {}
    for old, new in became.items():
        for spell in (_name, _ended, _dynamic, _bracketed):
            table[spell(old)] = [spell(name) for name in new]
        if _LAYER.search(old):
            short.setdefault(_short(old), [_short(name) for name in new])
    return short | table


def _name(module: str) -> str:
    return module


def _ended(module: str) -> str:
    """As the format fp8 has it where transformers would take too much (``Fp8.config``)."""
    return module + "$"


def _dynamic(module: str) -> str:
    """As gptqmodel's ``dynamic`` has it."""
    return f"-:^{re.escape(module)}$"


def _bracketed(module: str) -> str:
    """As the format modelopt has it where vLLM would take too much."""
    return f"{module[:-1]}[{module[-1:]}]"


def _short(module: str) -> str:
    """Behind the number of the layer, as ``modules_in_block_to_quantize`` of gptq has it."""
    return _LAYER.split(module, maxsplit=1)[-1]
