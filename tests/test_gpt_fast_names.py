"""gpt-fast's own names: q, k and v in one weight, heads ordered as it rotates them."""

import ml_dtypes
import numpy as np
import pytest
from helpers import run_convert, tensors_of, write_checkpoint

from streamq.checkpoint import open_checkpoint
from streamq.errors import PlanError
from streamq.formats import named
from streamq.schemes import ALL
from streamq.stored import open_tensors
from streamq.verifying import verify

HEADS, GROUPS, SIZE, WIDTH = 4, 2, 8, 64
CONFIG = {"model_type": "llama", "num_attention_heads": HEADS, "head_dim": SIZE}
LAYER = "model.layers.0."
FORMAT = named("gpt-fast", gpt_fast_names=True)


def draw(seed, rows, cols=WIDTH):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, cols)) * 0.02).astype(ml_dtypes.bfloat16)


TENSORS = {
    "model.embed_tokens.weight": draw(1, 32),
    LAYER + "self_attn.q_proj.weight": draw(2, HEADS * SIZE),
    LAYER + "self_attn.k_proj.weight": draw(3, GROUPS * SIZE),
    LAYER + "self_attn.v_proj.weight": draw(4, GROUPS * SIZE),
    LAYER + "self_attn.o_proj.weight": draw(5, WIDTH, HEADS * SIZE),
    LAYER + "mlp.gate_proj.weight": draw(6, 96),
    LAYER + "mlp.up_proj.weight": draw(7, 96),
    LAYER + "mlp.down_proj.weight": draw(8, WIDTH, 96),
    LAYER + "input_layernorm.weight": np.ones(WIDTH, ml_dtypes.bfloat16),
    LAYER + "post_attention_layernorm.weight": np.ones(WIDTH, ml_dtypes.bfloat16),
    "model.norm.weight": np.ones(WIDTH, ml_dtypes.bfloat16),
    "lm_head.weight": draw(9, 32),
}


def permuted(w, heads):
    """gpt-fast's ``permute`` of convert_hf_checkpoint.py, from its formula."""
    out = np.empty_like(w)
    for h in range(heads):
        for i in range(SIZE // 2):
            out[h * SIZE + 2 * i] = w[h * SIZE + i]
            out[h * SIZE + 2 * i + 1] = w[h * SIZE + SIZE // 2 + i]
    return out


def expected():
    """Float weights under gpt-fast's names."""
    q, k, v = (TENSORS[f"{LAYER}self_attn.{p}_proj.weight"] for p in "qkv")
    return {
        "layers.0.attention.wqkv.weight":
            np.concatenate([permuted(q, HEADS), permuted(k, GROUPS), v]),
        "layers.0.attention.wo.weight": TENSORS[LAYER + "self_attn.o_proj.weight"],
        "layers.0.feed_forward.w1.weight": TENSORS[LAYER + "mlp.gate_proj.weight"],
        "layers.0.feed_forward.w3.weight": TENSORS[LAYER + "mlp.up_proj.weight"],
        "layers.0.feed_forward.w2.weight": TENSORS[LAYER + "mlp.down_proj.weight"],
        "output.weight": TENSORS["lm_head.weight"],
    }  # fmt: skip


COPIED = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "layers.0.attention_norm.weight": LAYER + "input_layernorm.weight",
    "layers.0.ffn_norm.weight": LAYER + "post_attention_layernorm.weight",
    "norm.weight": "model.norm.weight",
}


@pytest.fixture(params=["one file", "q, k and v apart"])
def source(request, tmp_path):
    names = list(TENSORS)
    shards = None if request.param == "one file" else [names[:2], names[2:3], names[3:]]
    return write_checkpoint(tmp_path / "in", TENSORS, CONFIG, shards)


@pytest.mark.parametrize("slab", [1 << 20, 300])
def test_names_rows_and_codes(slab, source, tmp_path, monkeypatch):
    monkeypatch.setattr("streamq.converting.slabs.STORED_SLAB", slab)
    run_convert(source, tmp_path / "out", "W8A16", format=FORMAT)
    plain = write_checkpoint(tmp_path / "plain", expected(), {})
    run_convert(plain, tmp_path / "want", "W8A16", group_size=ALL, format=named("gpt-fast"),
                only=("layers*",))  # fmt: skip
    got, want = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "want")
    scaled = {n.replace(".weight", ".scales") for n in expected()}
    assert sorted(got) == sorted({*expected(), *scaled, *COPIED})
    for name, (t, data) in want.items():
        if not name.startswith("output"):
            assert (got[name][0].dtype, got[name][0].shape) == (t.dtype, t.shape)
            assert got[name][1] == data
    assert got["output.weight"][0].dtype == "I8"
    for name, old in COPIED.items():
        assert got[name][1] == TENSORS[old].tobytes()


def test_it_verifies_and_reads_again(source, tmp_path):
    run_convert(source, tmp_path / "out", "W8A16", format=FORMAT)
    with open_checkpoint(source) as c:
        report = verify(tmp_path / "out", c)
    assert (report.failures, report.quantized) == ([], 6)
    with open_tensors(tmp_path / "out") as tensors:
        for name, x in expected().items():
            assert np.abs(tensors[name] - x.astype("f4")).max() < 0.001


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({LAYER + "self_attn.k_proj.weight": None}, "'.*q_proj.weight' has no k_proj and v_proj"),
        ({LAYER + "self_attn.k_proj.weight": draw(3, 12)}, "not whole heads of 8 rows"),
    ],
)
def test_what_does_not_fit_is_refused(change, message, tmp_path):
    tensors = {n: t for n, t in {**TENSORS, **change}.items() if t is not None}
    src = write_checkpoint(tmp_path / "in", tensors, CONFIG)
    with pytest.raises(PlanError, match=message):
        run_convert(src, tmp_path / "out", "W8A16", format=FORMAT)
