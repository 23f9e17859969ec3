"""``--fuse``: what loaders concatenate, concatenated."""

from __future__ import annotations

from streamq.errors import PlanError

from .modules import Modules
from .weights import Made, Rows, make, weight_of

#: Fused modules and their members, in the order of their rows.
FUSIONS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


def fuse(m: Modules) -> tuple[list[Made], dict[str, list[str]], list[str]]:
    """What is made, the new modules of each that is gone, and notes.

    Groups that lack a member stay as they are, and so do experts that share a tensor. Raises
    PlanError for members that differ in more than their rows.
    """
    found = m.look()
    made: list[Made] = []
    became: dict[str, list[str]] = {}
    notes: list[str] = []
    lacking: list[str] = []
    stacks: list[str] = []
    for name, leaves in FUSIONS.items():
        for parent in _parents(m, leaves):
            members = [f"{parent}{leaf}" for leaf in leaves]
            missing = [module for module in members if module not in m.tensors]
            if missing:
                lacking.append(missing[0])
                continue
            if not all(m.is_matrix(module) for module in members):
                stacks.append(members[0])
                continue
            weights = [weight_of(m.source, found, module, m.tensors[module]) for module in members]
            module = f"{parent}{name}"
            if module in m.tensors:
                raise PlanError(f"{module!r} is in the source already, beside {members[0]!r}.")
            made.append(make(m.source, module, [Rows(w, 0, w.shape[0]) for w in weights]))
            became |= {member: [module] for member in members}
    if lacking:
        notes.append(f"{len(lacking)} groups stay as they are, for lack of {lacking[0]} and such")
    if stacks:
        notes.append(f"{len(stacks)} groups stay as they are, as {stacks[0]} is no matrix")
    return made, became, notes


def _parents(m: Modules, leaves: tuple[str, ...]) -> list[str]:
    """What comes before the dot, and the dot, of all modules with one of these names."""
    found: dict[str, None] = {}
    for module in m.tensors:
        parent, dot, leaf = module.rpartition(".")
        if leaf in leaves:
            found[parent + dot] = None
    return list(found)
