"""The description file of a checkpoint for Ascend: every tensor of the output with its type."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from streamq.errors import PlanError
from streamq.families import Family, expert_name
from streamq.formats import Ascend, format_of
from streamq.formats.ascend import description_of, type_of
from streamq.formats.ascend_description import FLOAT, Description, build
from streamq.formats.ascend_readers import findings, warnings
from streamq.schemes import ALL, Scheme

_PARTS = {*Ascend.code_suffixes, *Ascend.other_suffixes}
#: Keys that each description has of its own.
_OWN = ("model_quant_type", "version", "group_size")


def described(
    names: Iterable[str], modules: Mapping[Scheme, list[str]], family: Family,
    config: Mapping[str, Any],
) -> tuple[dict[str, Any], list[str]]:  # fmt: skip
    """The contents of the file, and warnings.

    ``names``: of all tensors, as JSON spells them. ``modules``: those of each scheme.
    ``config``: of the source. Raises PlanError for what no loader reads.
    """
    spelled: list[str] = json.loads('["' + '", "'.join(names) + '"]')
    by_module = {m: type_of(scheme) for scheme, found in modules.items() for m in found}
    before = _before(config)
    types = {}
    for name in spelled:
        module, _, suffix = name.rpartition(".")
        type_ = by_module.get(module) if suffix in _PARTS else None
        types[name] = type_ or before.types.get(name, FLOAT)
    types |= dict.fromkeys(_looked_up(types, family), FLOAT)
    more = {key: value for key, value in before.head.items() if key not in _OWN}
    made = build(types, _group_size(modules), **more)
    if (wrong := next(findings(made, spelled, family), None)) is not None:
        raise PlanError(f"{wrong}; give those one scheme, or leave them with --ignore.")
    said = list(warnings(made, spelled, family))
    if more.get("optional"):
        said.append("files that optional of the description names are not copied")
    return made.as_json(), said


def _looked_up(types: Mapping[str, str], family: Family) -> Iterator[str]:
    """Weights that a loader looks up although no tensor has their name.

    A head that is tied to the embedding, and expert 0 of stacks that stay in one tensor.
    """
    if not any("lm_head" in name for name in types):
        yield "lm_head.weight"
    for name, type_ in types.items():
        if type_ == FLOAT and (layout := family.layout_of(name)) is not None:
            for part in layout.parts_of(name):
                yield f"{expert_name(name, 0, part)}.weight"


def _before(config: Mapping[str, Any]) -> Description:
    """What a source said of tensors that stay as they are, such as scales of the KV cache."""
    if not isinstance(format_of(config), Ascend):
        return Description({})
    said = description_of(config)
    scheme_of, _ = format_of(config).rules(config)
    parts = _PARTS - {"weight"}
    types = {}
    for name, type_ in said.types.items():
        module, _, suffix = name.rpartition(".")
        # Those of weights are said anew.
        if suffix not in parts and (suffix != "weight" or scheme_of(module) is None):
            types[name] = type_
    return Description(types, said.head)


def _group_size(modules: Mapping[Scheme, list[str]]) -> int:
    """The one size that the file can name; whole rows have none.

    Raises PlanError for two sizes.
    """
    sizes = {s.block[1]: s for s in modules if s.block[1] != ALL}
    if len(sizes) > 1:
        a, b = list(sizes.values())[:2]
        raise PlanError(
            f"groups of {a.block[1]} ({type_of(a)}) and of {b.block[1]} ({type_of(b)}) would be in "
            "one checkpoint, but the format ascend names one size for all."
        )
    return next(iter(sizes), 0)
