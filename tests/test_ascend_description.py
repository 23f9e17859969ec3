"""quant_model_description.json: what is read, what is built, what is refused."""

import json

import pytest

from streamq.errors import CheckpointError
from streamq.formats.ascend_description import FILE, build, load, model_type, parse

TYPES = {
    "model.embed_tokens.weight": "FLOAT", "hc_head_fn": "FLOAT",
    "m.q_proj.weight": "W8A8_DYNAMIC", "m.q_proj.weight_scale": "W8A8_DYNAMIC",
}  # fmt: skip


def test_what_is_built_is_read_back(tmp_path):
    made = build(TYPES, 32, is_rot_used=False)
    assert made.as_json() == {
        "model_quant_type": "W8A8_DYNAMIC", "version": "1.0.0", "group_size": 32, "metadata": {},
        "optional": {}, "is_rot_used": False, **TYPES,
    }  # fmt: skip
    (tmp_path / FILE).write_text(json.dumps(made.as_json()))
    assert load(tmp_path) == made
    assert made.type_of("m.q_proj") == "W8A8_DYNAMIC"
    assert made.type_of("m.k_proj") is None
    assert made.group_size == 32
    assert list(made.missing(["hc_head_fn", "a", "m.q_proj.weight", "b"])) == ["a", "b"]


def test_group_size_may_be_absent():
    assert parse({"model_quant_type": "W8A8", **TYPES}).group_size == 0


# By msmodelslim's list of priorities: the last of them that there is; W4A8_DYNAMIC alone only.
MODEL_TYPES = [
    ([], "Unknown"),
    (["FLOAT"], "FLOAT"),
    (["FLOAT", "W8A8_DYNAMIC"], "W8A8_DYNAMIC"),
    (["W8A16", "W8A8_DYNAMIC", "FLOAT"], "W8A8_DYNAMIC"),
    (["W8A8_DYNAMIC", "W8A8_MIX", "W8A8"], "W8A8"),
    (["W8A8_MXFP8", "W4A8_MXFP", "W4A4_MXFP4"], "W4A4_MXFP4"),
    (["W4A8_DYNAMIC", "FLOAT"], "W4A8_DYNAMIC"),
    (["W4A8_DYNAMIC", "W8A8_DYNAMIC"], "W8A8_DYNAMIC"),
    (["C8", "W8A8S", "FLOAT"], "W8A8S"),
]


@pytest.mark.parametrize(("types", "want"), MODEL_TYPES)
def test_the_type_of_the_model(types, want):
    assert model_type(types) == want


REFUSED = {
    "a type that is no text": ({**TYPES, "m.bias": 8}, "the type of 'm.bias' must be a text"),
    "a group size that is a text": ({**TYPES, "group_size": "32"}, "group_size must be a number"),
    "a group size below zero": ({**TYPES, "group_size": -1}, "group_size must be a number"),
    "no tensors": ({"version": "1.0.0", "group_size": 0}, "no tensor has an entry"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_description_is_refused(case):
    found, sentence = REFUSED[case]
    with pytest.raises(CheckpointError, match=f"{FILE}: {sentence}"):
        parse(found)
