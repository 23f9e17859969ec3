"""Which tensors belong together, and which stay as they are: one table each.

A loader concatenates the members of a fused group, so they share one scheme and, for
NVFP4, one global scale. Grouping, planning and verification all read these tables.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from streamq.schemes import Scheme

from .experts import EXPERT_LAYOUTS, ExpertLayout, expert_name, is_expert_stack, layout_among
from .groups import FUSED_GROUPS, FusedGroup
from .left_alone import GENERIC, LEFT_ALONE, MTP_LAYERS, LeftAlone, applies
from .names import BAD_REGEX, collapse, matcher

__all__ = [
    "BAD_REGEX", "EXPERT_LAYOUTS", "FUSED_GROUPS", "GENERIC", "LEFT_ALONE", "MTP_LAYERS",
    "ExpertLayout", "Family", "FusedGroup", "LeftAlone", "collapse", "expert_name",
    "is_expert_stack", "matcher",
]  # fmt: skip


class Family:
    """What is known about one model, from its config.json.

    ``config``: with the keys of ``text_config`` above its own.
    """

    def __init__(
        self,
        config: dict[str, Any],
        *,
        extra_groups: tuple[FusedGroup, ...] = (),
        extra_experts: tuple[ExpertLayout, ...] = (),
    ) -> None:
        """``extra_groups``, ``extra_experts``: rows of a recipe, before those of the tables."""
        text = config.get("text_config")
        text = text if isinstance(text, dict) else {}
        self.config = {**config, **text}
        self.model_type = str(config.get("model_type") or "")
        named = {str(c.get("model_type") or "") for c in (config, text)} - {""}
        types = named | {name.removesuffix("_text") for name in named}
        layers = self.config.get("num_hidden_layers")
        self._layers = layers if isinstance(layers, int) else None
        groups = [g for g in FUSED_GROUPS if not g.model_types]
        groups += [g for g in FUSED_GROUPS if types & {*g.model_types}]
        self._group = {member: g for g in (*groups, *extra_groups) for member in g.members}
        rows = [r for r in LEFT_ALONE if not r.model_types or types & {*r.model_types}]
        self._left_alone = [(r, matcher(p for p in r.patterns if p != MTP_LAYERS)) for r in rows]
        own = tuple(r for r in EXPERT_LAYOUTS if types & {*r.model_types})
        self._experts = (*extra_experts, *own)
        every = (*FUSED_GROUPS, *LEFT_ALONE, *EXPERT_LAYOUTS)
        self.known = bool(types & {*GENERIC, *(name for row in every for name in row.model_types)})

    def layout_of(self, stack: str) -> ExpertLayout | None:
        """How the experts in a tensor lie, None where that is not known."""
        return layout_among(self._experts, stack)

    def group_of(self, module: str) -> tuple[str, FusedGroup] | None:
        """The fused group of a module and the parent it lies under, or None."""
        parent, _, leaf = module.rpartition(".")
        group = self._group.get(leaf)
        return None if group is None else (parent, group)

    def left_alone(self, scheme: Scheme) -> Callable[[str], str | None]:
        """A function from a module to the reason why it stays unquantized, or None.

        Layers have their modules in common, so each answer is found once per collapsed name, and
        names are collapsed once for all leaves of a parent.
        """
        rows = [(row, test) for row, test in self._left_alone if applies(row, scheme)]
        mtp = next((row.reason for row, _ in rows if MTP_LAYERS in row.patterns), None)
        known: dict[str, dict[str, str | None]] = {}
        leaves_of: dict[str, dict[str, str | None]] = {}

        def why(module: str) -> str | None:
            if mtp is not None and self._is_mtp(module):
                return mtp
            parent, _, leaf = module.rpartition(".")
            leaves = leaves_of.get(parent)
            if leaves is None:
                leaves = leaves_of[parent] = known.setdefault(collapse(parent), {})
            if leaf not in leaves:
                name = collapse(module)
                leaves[leaf] = next((row.reason for row, test in rows if test(name)), None)
            return leaves[leaf]

        return why

    def _is_mtp(self, module: str) -> bool:
        if self._layers is None:
            return False
        found = re.search(r"(?:^|\.)layers\.(\d+)(?:\.|$)", module)
        return found is not None and int(found[1]) >= self._layers
