"""Mixed configs of several models, for the tests of readers: modules with their schemes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import product
from typing import Any

from streamq.formats import FORMATS
from streamq.schemes import SCHEMES, Scheme

LAYERS, EXPERTS = 3, 2

Modules = dict[str, Scheme | None]

#: As models of vLLM have them.
FUSED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    "fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"],
}


def units(kind: str) -> list[list[str]]:
    """Modules of a model, together where loaders want one scheme."""
    found = [["lm_head"]]
    prefix = "model.language_model." if kind == "vision" else "model."
    for i in range(LAYERS):
        layer = f"{prefix}layers.{i}."
        if kind == "mla":
            found += [[f"{layer}self_attn.{p}" for p in ("q_a_proj", "kv_a_proj_with_mqa")]]
            found += [[f"{layer}self_attn.{p}"] for p in ("q_b_proj", "kv_b_proj", "o_proj")]
        else:
            found += [[f"{layer}self_attn.{p}_proj" for p in "qkv"], [f"{layer}self_attn.o_proj"]]
        if kind in ("moe", "mla") and i:
            names = (f"{e}.{p}_proj" for e, p in product(range(EXPERTS), ("gate", "up", "down")))
            found += [[f"{layer}mlp.experts.{name}" for name in names], [f"{layer}mlp.gate"]]
            layer += "mlp.shared_experts." if kind == "mla" else "mlp.shared_expert."
        else:
            layer += "mlp."
        found += [[f"{layer}gate_proj", f"{layer}up_proj"], [f"{layer}down_proj"]]
        if kind == "vision":
            found += [[f"model.visual.blocks.{i}.attn.{p}_proj" for p in "qkv"],
                      [f"model.visual.blocks.{i}.mlp.down_proj"]]  # fmt: skip
    return found


def configs() -> Iterator[tuple[str, dict[str, Any], Modules]]:
    """A name, a config.json, and what each module is meant to be."""
    rng = random.Random(0)
    some: list[Scheme | None] = [None, SCHEMES["W4A16"], SCHEMES["FP8_DYNAMIC"], SCHEMES["W8A16"]]
    for kind, how, seed in product(
        ("dense", "moe", "mla", "vision"), ("kind", "layer", "each", "one"), range(3)
    ):
        chosen: dict[Any, Scheme | None] = {}
        modules: Modules = {}
        for unit in units(kind):
            parts = unit[0].split(".")
            number = next((p for p in parts if p.isdigit()), "")
            name = ".".join(p for p in parts if not p.isdigit())
            key = {"kind": name, "layer": (number, "experts" in parts), "each": unit[0]}.get(how)
            if how == "one":
                scheme = rng.choice([None, *some[1:2] * 3])
            else:
                scheme = chosen.setdefault(key, rng.choice(some))
            modules |= dict.fromkeys(unit, scheme)
        schemes: dict[Scheme, list[str]] = {}
        for name, scheme in modules.items():
            if scheme is not None:
                schemes.setdefault(scheme, []).append(name)
        if schemes:
            ignore = [name for name, scheme in modules.items() if scheme is None]
            config = FORMATS["compressed-tensors"].config(schemes, ignore, {})
            yield f"{kind}-{how}-{seed}", config, modules


def layers_of(modules: Modules) -> dict[str, list[str]]:
    """The layers that vLLM makes of modules: fused ones, experts as one, all others alone."""
    parts = {part: fused for fused, members in FUSED.items() for part in members}
    layers: dict[str, list[str]] = {}
    for module in modules:
        parent, _, leaf = module.rpartition(".")
        layer = f"{parent}.{parts[leaf]}" if leaf in parts else module
        if ".experts." in module:
            layer = module[: module.index(".experts.") + len(".experts")]
        layers.setdefault(layer, []).append(module)
    return layers
