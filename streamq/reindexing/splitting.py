"""``--split``: weights that hold several modules, taken apart.

How the rows lie is known from config.json and the model type. qwen3_next has the rows of each
key head, those of q, k, v and z, together (``fix_query_key_value_ordering`` in transformers);
qwen3_5 has all of q, k, v and then all of z.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from streamq.errors import PlanError
from streamq.families import is_expert_stack
from streamq.formats import Plain
from streamq.planning.experts import experts_of
from streamq.tensors import FLOATS, TensorInfo

from .modules import Modules
from .types import Out, whole
from .weights import Made, Rows, Weight, make, weight_of

#: Rows of the parts of a weight, by the name of the part.
Parts = dict[str, list[Rows]]


def split(m: Modules) -> tuple[list[Made], dict[str, list[str]], list[str]]:
    """What is made, the new modules of each that is gone, and notes.

    Raises PlanError for rows that config.json does not explain, or that cannot be parted.
    """
    found = m.look()
    made: list[Made] = []
    became: dict[str, list[str]] = {}
    for module, tensors in m.tensors.items():
        parent, dot, leaf = module.rpartition(".")
        rows_of = _ROWS.get(leaf)
        if rows_of is None or not m.is_matrix(module):
            continue
        parts = rows_of(m, weight_of(m.source, found, module, tensors))
        became[module] = [f"{parent}{dot}{part}" for part in parts]
        for name, rows in zip(became[module], parts.values(), strict=True):
            if name in m.tensors:
                raise PlanError(f"{name!r} is in the source already, beside {module!r}.")
            made.append(make(m.source, name, rows))
    experts, stacks, notes = _experts(m)
    return made + experts, became | stacks, notes


# --- rows -----------------------------------------------------------------------------


def _gate_up(m: Modules, w: Weight) -> Parts:
    half, odd = divmod(w.shape[0], 2)
    if odd:
        raise PlanError(f"the weight of {w.module!r} has {w.shape[0]} rows, not two halves.")
    return {"gate_proj": [Rows(w, 0, half)], "up_proj": [Rows(w, half, half)]}


def _qkv(m: Modules, w: Weight) -> Parts:
    found = {sizes for sizes in _qkv_sizes(m) if sum(sizes) == w.shape[0]}
    if len(found) != 1:
        said = _said(m, "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")
        raise PlanError(
            f"the weight of {w.module!r} has {w.shape[0]} rows, which are not q, k and v as "
            f"config.json has them: {said}."
        )
    q, k, v = found.pop()
    return {
        "q_proj": [Rows(w, 0, q)], "k_proj": [Rows(w, q, k)], "v_proj": [Rows(w, q + k, v)],
    }  # fmt: skip


def _qkv_sizes(m: Modules) -> list[tuple[int, int, int]]:
    """Rows of q, k and v that config.json allows; layers may differ in the size of a head."""
    c = m.family.config
    heads = _int(c, "num_attention_heads")
    kv = _int(c, "num_key_value_heads") or heads
    dim = _int(c, "head_dim") or (_int(c, "hidden_size") // heads if heads else 0)
    wide = _int(c, "global_head_dim") or dim
    # The queries of these come with a gate of their size.
    gated = m.family.model_type.startswith(("qwen3_next", "qwen3_5"))
    return [
        (heads * d * (2 if gated else 1), n * d, n * (_int(c, "v_head_dim") or d))
        for d, n in ((dim, kv), (wide, _int(c, "num_global_key_value_heads") or kv))
        if heads and d
    ]


def _qkvz(m: Modules, w: Weight) -> Parts:
    k_heads, k_dim, v_heads, v_dim = _linear_attention(m)
    _refuse_other(m, w, 2 * k_heads * k_dim + 2 * v_heads * v_dim)
    if not _interleaved(m, w):
        qkv = 2 * k_heads * k_dim + v_heads * v_dim
        return {"in_proj_qkv": [Rows(w, 0, qkv)], "in_proj_z": [Rows(w, qkv, v_heads * v_dim)]}
    values = v_heads // k_heads * v_dim
    step = 2 * k_dim + 2 * values
    sizes = (0, k_dim), (k_dim, k_dim), (2 * k_dim, values), (2 * k_dim + values, values)
    *qkv_rows, z = (Rows(w, first, rows, k_heads, step) for first, rows in sizes)
    return {"in_proj_qkv": qkv_rows, "in_proj_z": [z]}


def _ba(m: Modules, w: Weight) -> Parts:
    k_heads, _, v_heads, _ = _linear_attention(m)
    _refuse_other(m, w, 2 * v_heads)
    count, rows = (k_heads, v_heads // k_heads) if _interleaved(m, w) else (1, v_heads)
    b, a = (Rows(w, first, rows, count, 2 * rows) for first in (0, rows))
    return {"in_proj_b": [b], "in_proj_a": [a]}


_ROWS: dict[str, Callable[[Modules, Weight], Parts]] = {
    "qkv_proj": _qkv, "gate_up_proj": _gate_up, "in_proj_qkvz": _qkvz, "in_proj_ba": _ba,
}  # fmt: skip

_LINEAR = ("linear_num_key_heads", "linear_key_head_dim", "linear_num_value_heads",
           "linear_value_head_dim")  # fmt: skip


def _linear_attention(m: Modules) -> tuple[int, ...]:
    """Heads and their sizes, of keys and of values; 0 for what config.json does not say."""
    return tuple(_int(m.family.config, key) for key in _LINEAR)


def _interleaved(m: Modules, w: Weight) -> bool:
    """Whether the rows of a key head lie together. Raises PlanError where that is not known."""
    model_type = m.family.model_type
    if model_type.startswith("qwen3_next"):
        return True
    if model_type.startswith("qwen3_5"):
        return False
    raise PlanError(
        f"how the rows of {w.module!r} lie is not known for the model_type {model_type!r}; of "
        "qwen3_next and qwen3_5 it is."
    )


def _refuse_other(m: Modules, w: Weight, rows: int) -> None:
    """Raise PlanError for another number of rows than config.json says."""
    k_heads, _, v_heads, _ = _linear_attention(m)
    if rows == w.shape[0] and rows and k_heads and v_heads % k_heads == 0:
        return
    raise PlanError(
        f"the weight of {w.module!r} has {w.shape[0]} rows, which are not those of config.json: "
        f"{_said(m, *_LINEAR)}."
    )


def _int(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    return value if isinstance(value, int) and value > 0 else 0


def _said(m: Modules, *keys: str) -> str:
    return ", ".join(f"{key} {m.family.config.get(key)}" for key in keys)


# --- experts --------------------------------------------------------------------------


def _experts(m: Modules) -> tuple[list[Made], dict[str, list[str]], list[str]]:
    """The experts in tensors of three dimensions, each projection a module of its own."""
    why: dict[str, list[str]] = {}

    def stays(t: TensorInfo, pieces: list[TensorInfo]) -> str | None:
        layout = m.family.layout_of(t.name)
        if layout is not None and layout.unread:
            why.setdefault("no loader reads such experts one by one", []).append(t.name)
            return layout.unread
        return None

    for t in m.source.tensors.values():
        if not is_expert_stack(t.name, t.shape):
            continue
        if t.dtype not in FLOATS:
            why.setdefault("it is quantized", []).append(t.name)
        elif m.family.layout_of(t.name) is None:
            kind = m.family.model_type
            why.setdefault(f"how it lies is not known for the model_type {kind!r}", []).append(
                t.name
            )
    experts = experts_of(m.source, m.family, Plain(), stays)
    outs = [(stack, whole(t)) for stack, found in experts.rows.items() for t in found]
    for name, v in experts.views.items():
        t = v.tensor
        outs.append((t.name, Out(name, t.dtype, v.shape, v, t.file, t.start)))
    modules: dict[str, list[Out]] = {}
    became: dict[str, dict[str, None]] = {}
    for stack, o in outs:
        module = o.name.rpartition(".")[0]
        modules.setdefault(module, []).append(o)
        gone = stack.removesuffix(".weight").removesuffix("_bias")
        became.setdefault(gone, {})[module] = None
    made = [Made(module, found, None) for module, found in modules.items()]
    notes = [f"{len(names)} stacks of experts stay, the first {names[0]!r}: {reason}"
             for reason, names in why.items()]  # fmt: skip
    return made, {gone: list(names) for gone, names in became.items()}, notes
