"""mlx-lm computes with our stacks of experts what it computes with our dequantized weights."""

import json

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from helpers import run_convert, write_checkpoint
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear
from mlx_lm.utils import load_model

from streamq.formats import FORMATS
from streamq.stored import open_tensors

H, I, E, V, LAYERS = 128, 64, 12, 256, 2  # noqa: E741
TOKENS = mx.array(np.arange(64).reshape(2, 32) * 7 % V)
BASE = {
    "hidden_size": H, "num_hidden_layers": LAYERS, "vocab_size": V, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "max_position_embeddings": 512, "tie_word_embeddings": False, "dtype": "bfloat16",
    "num_experts_per_tok": 4,
}  # fmt: skip
CONFIGS = {
    "qwen3_moe": {
        **BASE, "intermediate_size": I, "moe_intermediate_size": I, "num_experts": E,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
    },
    "mixtral": {**BASE, "intermediate_size": I, "num_local_experts": E},
}  # fmt: skip
NAMES = {
    "qwen3_moe": ("mlp.", ("gate_proj", "up_proj", "down_proj")),
    "mixtral": ("block_sparse_moe.", ("w1", "w3", "w2")),
}
# As in test_mlx.py; the gathered products of affine stacks are summed in another order.
CLOSE = {"affine": 1e-4, "mxfp4": 3e-4}
SEEN = 2e-3


def _weights(model_type):
    """Random weights under the names of Hugging Face, experts one by one."""
    rng = np.random.default_rng(5)

    def draw(rows, cols):
        size = np.exp(rng.standard_normal((rows, 1)) / 2) / cols**0.5
        mean = rng.standard_normal((rows, 1))
        return ((rng.standard_normal((rows, cols)) + mean) * size).astype(ml_dtypes.bfloat16)

    ones = np.ones(H, ml_dtypes.bfloat16)
    w = {"model.embed_tokens.weight": draw(V, H), "model.norm.weight": ones,
         "lm_head.weight": draw(V, H)}  # fmt: skip
    block, (gate, up, down) = NAMES[model_type]
    for n in range(LAYERS):
        at = f"model.layers.{n}."
        w |= {at + "input_layernorm.weight": ones, at + "post_attention_layernorm.weight": ones}
        for p, rows in (("q_proj", H), ("k_proj", 64), ("v_proj", 64), ("o_proj", H)):
            w[f"{at}self_attn.{p}.weight"] = draw(rows, H)
        if model_type == "qwen3_moe":
            for p in ("q_norm", "k_norm"):
                w[f"{at}self_attn.{p}.weight"] = np.ones(32, ml_dtypes.bfloat16)
        w[f"{at}{block}gate.weight"] = draw(E, H)
        for e in range(E):
            w[f"{at}{block}experts.{e}.{gate}.weight"] = draw(I, H)
            w[f"{at}{block}experts.{e}.{up}.weight"] = draw(I, H)
            w[f"{at}{block}experts.{e}.{down}.weight"] = draw(H, I)
    return {n: w[n] for n in sorted(w)}


def _loaded(folder, **values):
    model, _ = load_model(folder)
    model.load_weights([(name, mx.array(w)) for name, w in values.items()], strict=False)
    model.set_dtype(mx.float32)
    return model


def _logits(model):
    return np.array(model(TOKENS))


@pytest.mark.parametrize("preset", ["W4A16_ASYM", "W8A16", "MXFP4A16"])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_mlx_lm_computes_with_our_experts(model_type, preset, tmp_path):
    """And sees experts that change places."""
    config = {"model_type": model_type, **CONFIGS[model_type]}
    src = write_checkpoint(tmp_path / "in", _weights(model_type), config)
    group = None if preset == "MXFP4A16" else 32
    run_convert(src, tmp_path / "out", preset, group_size=group, format=FORMATS["mlx"])
    model = _loaded(tmp_path / "out")
    made = {name: m for name, m in model.named_modules() if hasattr(m, "bits")}
    switches = {n: m for n, m in made.items() if isinstance(m, QuantizedSwitchLinear)}
    assert len(switches) == 3 * LAYERS
    mode = "mxfp4" if group is None else "affine"
    assert {m.mode for m in made.values()} == {mode}
    with open_tensors(tmp_path / "out") as t:
        quantized = {n for n in t.names if n.removesuffix(".weight") in made}
        values = {n: t[n] for n in quantized}
    assert {n + ".weight" for n in made} == quantized
    block = NAMES[model_type][0]
    assert values[f"model.layers.0.{block}switch_mlp.down_proj.weight"].shape == (E, H, I)
    found, want = _logits(model), _logits(_loaded(src, **values))
    assert np.isfinite(found).all()
    assert 0.5 < want.std() < 20
    assert np.abs(found - want).max() < CLOSE[mode]

    # Two experts that change places are seen, in each projection.
    for m in (m for n, m in switches.items() if ".1." in n):
        right = m.weight
        order = np.arange(E)
        order[[2, 11]] = 11, 2
        m.weight = right[mx.array(order)]
        assert np.abs(found - _logits(model)).max() > SEEN
        m.weight = right


@pytest.mark.parametrize("model_type", CONFIGS)
def test_stacks_of_floats_load(model_type, tmp_path):
    """What stays as it is beside quantized stacks, and all of it after ``-s bf16``."""
    config = {"model_type": model_type, **CONFIGS[model_type]}
    src = write_checkpoint(tmp_path / "in", _weights(model_type), config)
    down = NAMES[model_type][1][2]
    run_convert(src, tmp_path / "out", "W4A16_ASYM", group_size=32, format=FORMATS["mlx"],
                ignore=(f"*.experts.*.{down}",))  # fmt: skip
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    model = _loaded(tmp_path / "out")
    switches = [m for n, m in model.named_modules() if "switch_mlp." in n and "weight" in m]
    assert sum(isinstance(m, QuantizedSwitchLinear) for m in switches) == 2 * LAYERS
    assert len(switches) == 3 * LAYERS
    assert sum(entry is False for key, entry in said.items() if "switch_mlp" in key) == LAYERS
    run_convert(tmp_path / "out", tmp_path / "f32", "f32")
    back = _loaded(tmp_path / "f32")
    assert not any("scales" in name for name, _ in tree_flatten(back.parameters()))
    assert not any(isinstance(m, nn.QuantizedLinear) for m in back.modules())
    assert np.abs(_logits(model) - _logits(back)).max() < CLOSE["affine"]
