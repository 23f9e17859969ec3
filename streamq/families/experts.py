"""How the experts of a layer lie in one tensor of three dimensions, by model type.

Orientation is proved against config.json, because a stack that is split the wrong way
converts without a word and computes nonsense.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from streamq.errors import PlanError

from .names import matcher

#: The projections that tensors of these names hold, the first one first.
_PARTS = {
    **dict.fromkeys(
        ("gate_up_proj", "input_linear", "fc1", "w13", "wi", "gate_and_up_proj"),
        ("gate_proj", "up_proj"),
    ),
    **dict.fromkeys(("down_proj", "output_linear", "fc2", "wo"), ("down_proj",)),
    "gate_proj": ("gate_proj",), "up_proj": ("up_proj",),
    "w1": ("w1",), "w2": ("w2",), "w3": ("w3",),
}  # fmt: skip
#: Projections back to the hidden size.
_DOWN = ("down_proj", "w2")
_STACK = re.compile(rf"(^|\.)({'|'.join(_PARTS)})(\.weight)?$")


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """What tensors of three dimensions hold: the experts along the first axis.

    ``pattern``: a glob over names of tensors. ``transposed``: ``[in, out]`` each, not
    ``[out, in]``. ``interleaved``: rows of gate and up take turns, else gate comes first.
    ``parts``: the projections that a tensor holds, in order; where empty its name tells.
    ``unread``: why no loader reads the experts one by one, where that is so.
    """

    pattern: str
    transposed: bool = False
    interleaved: bool = False
    parts: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()
    unread: str = ""

    def parts_of(self, name: str) -> tuple[str, ...]:
        """The projections in a tensor. Raises PlanError where its name does not tell."""
        parts = self.parts or _PARTS.get(_leaf(name))
        if parts is None:
            raise PlanError(
                f"tensor {name!r} holds experts, but its name does not say of which projections; "
                'declare them in the recipe: parts = ["gate_proj", "up_proj"].'
            )
        return parts

    def refuse_unproved(self, name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> None:
        """Raise PlanError where config.json says that a tensor of this shape lies otherwise."""
        parts = self.parts_of(name)
        count, *axes = shape
        out, cols = reversed(axes) if self.transposed else axes
        down = parts[0] in _DOWN
        hidden, inter = (out, cols) if down else (cols, out / len(parts))
        found = {"hidden": hidden, "inter": inter, "experts": count}
        known = {key: next((n for n in names if isinstance(config.get(n), int)), None)
                 for key, names in _SIZES.items()}  # fmt: skip
        if all(n is None or found[key] == config[n] for key, n in known.items()):
            return
        said = ", ".join(f"{n} {config[n]}" for n in known.values() if n is not None)
        size = "intermediate" if len(parts) == 1 else f"{len(parts)} x intermediate"
        order = ["hidden", size] if down else [size, "hidden"]
        want = order[::-1] if self.transposed else order
        raise PlanError(
            f"tensor {name!r} of shape {list(shape)} is not [experts, {', '.join(want)}] as its "
            f"layout says, because config.json has {said}; declare its real layout in a recipe, "
            f"or leave it with --ignore '{name.removesuffix('.weight')}'."
        )


#: The keys of config.json that tell a size; the first that is there does.
_SIZES = {
    "hidden": ("hidden_size",),
    "inter": ("moe_intermediate_size", "intermediate_size"),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
}

EXPERT_LAYOUTS = (
    ExpertLayout(
        "*.experts.*_proj",
        model_types=("qwen3_5_moe", "gemma4", "gemma4_unified", "diffusion_gemma"),
    ),
    ExpertLayout("*.experts.*_proj", transposed=True, model_types=("qwen3_vl_moe", "llama4")),
    ExpertLayout("*.experts.fc[12].weight", transposed=True, model_types=("aria",)),
    ExpertLayout(
        "*.experts.*_proj", transposed=True, interleaved=True, model_types=("gpt_oss",),
        unread="vLLM and transformers skip gpt-oss experts that are quantized one by one; "
        "use --format gpt-oss",
    ),
    ExpertLayout(
        "*.block_sparse_moe.*put_linear.weight",
        model_types=("granitemoe", "granitemoeshared", "granitemoehybrid", "granitemoe_swa"),
    ),
    # As transformers 5 renames it.
    ExpertLayout(
        "*.block_sparse_moe.experts.*_proj",
        model_types=("granitemoe", "granitemoeshared", "granitemoehybrid", "granitemoe_swa"),
    ),
)  # fmt: skip


@cache
def _test(pattern: str) -> Any:
    return matcher((pattern,))


def layout_among(layouts: tuple[ExpertLayout, ...], name: str) -> ExpertLayout | None:
    """The first layout that names a tensor."""
    return next((row for row in layouts if _test(row.pattern)(name)), None)


def _leaf(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def is_expert_stack(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor looks like the weights of all experts of a layer in one."""
    return len(shape) == 3 and _STACK.search(name) is not None


def expert_name(stack: str, expert: int, part: str) -> str:
    """The module that loaders know one expert's projection by.

    ``x.experts.gate_up_proj`` holds ``x.experts.3.up_proj``, and
    ``x.block_sparse_moe.input_linear.weight`` ``x.block_sparse_moe.experts.3.up_proj``.
    """
    parent = stack.removesuffix(".weight").rpartition(".")[0]
    if parent.rpartition(".")[2] != "experts":
        parent = f"{parent}.experts" if parent else "experts"
    return f"{parent}.{expert}.{part}"
