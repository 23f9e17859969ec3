"""A plan in words."""

from __future__ import annotations

from streamq.schemes import Scheme, block_text

from .types import Plan


def scheme_text(plan: Plan) -> str:
    """What the scheme of a plan means, or that a recipe says it."""
    s = plan.options.scheme
    if plan.options.recipe is not None:
        return f"by a recipe; format {format_name(plan)}"
    if s.is_float:
        return f"{s.name.lower()} weights"
    return f"{numbers_text(s)}; format {format_name(plan)}"


def numbers_text(s: Scheme) -> str:
    """What numbers a scheme makes of weights and activations."""
    element = {"int": f"int{s.bits}", "e4m3": "FP8 e4m3", "e2m1": "FP4 e2m1"}[s.element]
    scale = {"weight": "the weight's dtype", "e4m3": "FP8 e4m3", "e8m0": "E8M0"}
    symmetry = "" if s.symmetric else ", zero points"
    level = ", an f32 scale above" if s.two_level else ""
    inputs = (
        "unquantized" if s.activation is None else f"{s.activation.bits}-bit {s.activation.element}"
    )
    return (
        f"{element} in blocks of {block_text(s.block)}, "
        f"scales in {scale.get(s.scale, s.scale)}{level}{symmetry}; activations {inputs}"
    )


def format_name(plan: Plan) -> str:
    """The name of the output's format."""
    assert plan.options.format is not None
    return plan.options.format.name
