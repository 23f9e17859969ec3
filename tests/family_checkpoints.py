"""Small checkpoints of every model family: names of tensors and keys of config.json as the
real ones have them, with random numbers.

``Family.each``: the experts that are stacked in three dimensions as weights of their own,
from the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

BF16 = ml_dtypes.bfloat16
#: Hidden size, intermediate size of an expert and of a dense layer, experts, vocabulary.
H, I, D, E, V = 128, 64, 192, 4, 64  # noqa: E741
LORA = 64  # rank of the compressed q and kv of MLA

Tensors = dict[str, np.ndarray]


class Stack(NamedTuple):
    """A tensor that holds experts: its projections, and how they lie."""

    name: str
    parts: tuple[str, ...]
    transposed: bool = False
    interleaved: bool = False


@dataclass
class Made:
    """One checkpoint. ``keeps``: modules that stay in FP4, of what has two dimensions."""

    config: dict[str, Any]
    tensors: Tensors = field(default_factory=dict)
    each: Tensors = field(default_factory=dict)
    stacks: list[Stack] = field(default_factory=list)
    keeps: set[str] = field(default_factory=set)


def draw(name: str, *shape: int) -> np.ndarray:
    """Numbers that follow from the name; one weight is larger than another by far."""
    rng = np.random.default_rng(list(name.encode()))
    return (rng.standard_normal(shape) * 0.02 * rng.choice([0.25, 1, 3])).astype(BF16)


class Maker:
    """Adds tensors to a checkpoint."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.made = Made(config)

    def put(self, name: str, *shape: int, keep: bool = False) -> None:
        """One weight."""
        self.made.tensors[name + ".weight"] = draw(name, *shape)
        if keep and len(shape) == 2:
            self.made.keeps.add(name)

    def vector(self, name: str, *shape: int) -> None:
        """A tensor that is no weight of a Linear."""
        self.made.tensors[name] = draw(name, *shape)

    def ends(self, prefix: str = "model.", head: str = "lm_head") -> None:
        """Embedding, last norm, output head."""
        self.put(prefix + "embed_tokens", V, H, keep=True)
        self.put(prefix + "norm", H)
        if head:
            self.put(head, V, H, keep=True)

    def attention(self, at: str, keep: bool = False, v: bool = True) -> None:
        """q, k, v and o of four heads and two."""
        self.put(at + "q_proj", H, H, keep=keep)
        self.put(at + "k_proj", 64, H, keep=keep)
        if v:
            self.put(at + "v_proj", 64, H, keep=keep)
        self.put(at + "o_proj", H, H, keep=keep)

    def mla(self, at: str, keep: bool = False) -> None:
        """Compressed q and kv."""
        self.put(at + "q_a_proj", LORA, H, keep=keep)
        self.put(at + "q_a_layernorm", LORA)
        self.put(at + "q_b_proj", H, LORA, keep=keep)
        self.put(at + "kv_a_proj_with_mqa", LORA + 16, H, keep=keep)
        self.put(at + "kv_b_proj", H, LORA, keep=True)
        self.put(at + "o_proj", H, H, keep=keep and "deepseek" not in self.made.config["model_type"]
                 and self.made.config["model_type"] != "kimi_k2")  # fmt: skip

    def mlp(self, at: str, inter: int = D, names: str = "gate_proj up_proj down_proj",
            keep: bool = False) -> None:  # fmt: skip
        """gate, up, down under their names."""
        gate, up, down = names.split()
        self.put(at + gate, inter, H, keep=keep)
        self.put(at + up, inter, H, keep=keep)
        self.put(at + down, H, inter, keep=keep)

    def experts(self, at: str, names: str = "gate_proj up_proj down_proj") -> None:
        """Experts in two dimensions."""
        for e in range(E):
            self.mlp(f"{at}{e}.", I, names)

    def stacked(
        self, gate_up: str, down: str, *, transposed: bool = False, interleaved: bool = False,
        parent: str = "", bias: bool = False,
    ) -> None:  # fmt: skip
        """Experts in three dimensions; ``parent``: what stands before an expert's number."""
        parent = parent or gate_up.rpartition(".")[0]
        gate, up, low = (
            np.stack([draw(f"{parent}.{e}.{p}", *shape) for e in range(E)])
            for p, shape in (("gate_proj", (I, H)), ("up_proj", (I, H)), ("down_proj", (H, I)))
        )
        both = np.stack([gate, up], 2).reshape(E, 2 * I, H)
        if not interleaved:
            both = np.concatenate([gate, up], 1)
        for name, x in ((gate_up, both), (down, low)):
            x = x.transpose(0, 2, 1) if transposed else x
            self.made.tensors[name] = np.ascontiguousarray(x)
        for e in range(E):
            for part, x in (("gate_proj", gate), ("up_proj", up), ("down_proj", low)):
                self.made.each[f"{parent}.{e}.{part}.weight"] = x[e]
        self.made.stacks += [
            Stack(gate_up, ("gate_proj", "up_proj"), transposed, interleaved),
            Stack(down, ("down_proj",), transposed),
        ]
        if bias:
            x, y = draw(gate_up + "_bias", E, 2 * I), draw(down + "_bias", E, H)
            self.made.tensors |= {gate_up + "_bias": x, down + "_bias": y}
            for e in range(E):
                self.made.each |= {
                    f"{parent}.{e}.gate_proj.bias": x[e, ::2] if interleaved else x[e, :I],
                    f"{parent}.{e}.up_proj.bias": x[e, 1::2] if interleaved else x[e, I:],
                    f"{parent}.{e}.down_proj.bias": y[e],
                }

    def norms(self, at: str) -> None:
        """Before attention and before the MLP."""
        self.put(at + "input_layernorm", H)
        self.put(at + "post_attention_layernorm", H)


def _config(model_type: str, **more: Any) -> dict[str, Any]:
    return {
        "model_type": model_type, "hidden_size": H, "num_hidden_layers": 2, "vocab_size": V,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "dtype": "bfloat16",
        "tie_word_embeddings": False, **more,
    }  # fmt: skip


def _nested(model_type: str, text_type: str = "", **more: Any) -> dict[str, Any]:
    """A vision model's: what counts is in text_config, and vision_config has other sizes."""
    text = _config(text_type or f"{model_type}_text", **more)
    vision = {"hidden_size": 96, "intermediate_size": 80, "model_type": f"{model_type}_vision"}
    return {"model_type": model_type, "dtype": "bfloat16", "text_config": text,
            "vision_config": vision, "tie_word_embeddings": False}  # fmt: skip


def dense(model_type: str) -> Made:
    """A llama, and what has its names."""
    m = Maker(_config(model_type, intermediate_size=D))
    m.ends()
    for n in (0, 1):
        at = f"model.layers.{n}."
        m.attention(at + "self_attn.")
        m.mlp(at + "mlp.")
        m.norms(at)
    return m.made


def phi3() -> Made:
    """q, k, v in one already, and gate with up."""
    m = Maker(_config("phi3", intermediate_size=D))
    m.ends()
    for n in (0, 1):
        at = f"model.layers.{n}."
        m.put(at + "self_attn.qkv_proj", H + 128, H)
        m.put(at + "self_attn.o_proj", H, H)
        m.put(at + "mlp.gate_up_proj", 2 * D, H)
        m.put(at + "mlp.down_proj", H, D)
        m.norms(at)
    return m.made


def qwen3_moe() -> Made:
    """Experts in two dimensions beside a router."""
    m = Maker(_config("qwen3_moe", moe_intermediate_size=I, intermediate_size=D, num_experts=E))
    m.ends()
    for n in (0, 1):
        at = f"model.layers.{n}."
        m.attention(at + "self_attn.")
        m.put(at + "mlp.gate", E, H, keep=True)
        m.experts(at + "mlp.experts.")
        m.norms(at)
    return m.made


def mixtral() -> Made:
    """w1, w2, w3."""
    m = Maker(_config("mixtral", intermediate_size=I, num_local_experts=E))
    m.ends()
    for n in (0, 1):
        at = f"model.layers.{n}."
        m.attention(at + "self_attn.")
        m.put(at + "block_sparse_moe.gate", E, H, keep=True)
        m.experts(at + "block_sparse_moe.experts.", "w1 w3 w2")
        m.norms(at)
    return m.made


def minimax_m2() -> Made:
    """Mixtral's names, attention stays in FP4."""
    m = Maker(_config("minimax_m2", intermediate_size=I, num_local_experts=E))
    m.ends()
    for n in (0, 1):
        at = f"model.layers.{n}."
        m.attention(at + "self_attn.", keep=True)
        m.put(at + "block_sparse_moe.gate", E, H, keep=True)
        m.vector(at + "block_sparse_moe.e_score_correction_bias", E)
        m.experts(at + "block_sparse_moe.experts.", "w1 w3 w2")
        m.norms(at)
    return m.made


def deepseek(model_type: str) -> Made:
    """MLA, one dense layer, one of experts, and the MTP layer behind the last."""
    m = Maker(_config(model_type, moe_intermediate_size=I, intermediate_size=D, n_routed_experts=E,
                      num_nextn_predict_layers=1, kv_lora_rank=LORA, q_lora_rank=LORA))  # fmt: skip
    glm = model_type == "glm_moe_dsa"
    m.ends()
    for n in (0, 1, 2):
        at, mtp = f"model.layers.{n}.", n == 2
        m.mla(at + "self_attn.", keep=True)
        if mtp:
            m.made.keeps.add(at + "self_attn.o_proj")
        if glm or model_type == "deepseek_v32":
            for leaf, rows, cols in (("wq_b", H, LORA), ("wk", 32, H), ("weights_proj", 4, H)):
                m.put(f"{at}self_attn.indexer.{leaf}", rows, cols, keep=True)
        if n == 0:
            m.mlp(at + "mlp.")
        else:
            m.put(at + "mlp.gate", E, H, keep=True)
            m.vector(at + "mlp.gate.e_score_correction_bias", E)
            m.experts(at + "mlp.experts.")
            m.mlp(at + "mlp.shared_experts.", I)
        m.norms(at)
    at = "model.layers.2."
    m.put(at + "eh_proj", H, 2 * H, keep=True)
    m.put(at + "enorm", H)
    m.put(at + "embed_tokens", V, H, keep=True)
    m.put(at + "shared_head.head", V, H, keep=True)
    m.made.keeps |= {n.removesuffix(".weight") for n, x in m.made.tensors.items()
                     if n.startswith(at) and x.ndim == 2}  # fmt: skip
    return m.made


def kimi_k25() -> Made:
    """Routed experts and nothing else; the language model lies deeper, beside a vision tower."""
    config = _nested("kimi_k25", "kimi_k2", moe_intermediate_size=I, n_routed_experts=E)
    m = Maker(config)
    m.ends("language_model.model.", "language_model.lm_head")
    for n in (0, 1):
        at = f"language_model.model.layers.{n}."
        m.mla(at + "self_attn.", keep=True)
        if n == 0:
            m.mlp(at + "mlp.", keep=True)
        else:
            m.put(at + "mlp.gate", E, H, keep=True)
            m.experts(at + "mlp.experts.")
            m.mlp(at + "mlp.shared_experts.", I, keep=True)
        m.norms(at)
    m.put("vision_tower.encoder.blocks.0.wqkv", 96, 32, keep=True)
    m.put("mm_projector.proj.0", 96, 32, keep=True)
    return m.made


def kimi_linear() -> Made:
    """Gates of linear attention share the scale of q, k and v."""
    m = Maker(_config("kimi_linear", moe_intermediate_size=I, num_experts=E))
    m.ends()
    at = "model.layers.0."
    m.attention(at + "self_attn.")
    for leaf, rows, cols in (("f_a_proj", 32, H), ("f_b_proj", H, 32), ("g_a_proj", 32, H),
                             ("g_b_proj", H, 32), ("b_proj", 4, H)):  # fmt: skip
        m.put(at + "self_attn." + leaf, rows, cols)
    m.put(at + "self_attn.q_conv1d", H, 1, 4)
    m.put(at + "block_sparse_moe.gate", E, H, keep=True)
    m.experts(at + "block_sparse_moe.experts.", "w1 w3 w2")
    m.norms(at)
    return m.made


def qwen3_next() -> Made:
    """in_proj_qkvz and in_proj_ba in one; experts in two dimensions; MTP under its own name."""
    m = Maker(_config("qwen3_next", moe_intermediate_size=I, num_experts=E,
                      shared_expert_intermediate_size=I))  # fmt: skip
    m.ends()
    for at, linear in (("model.layers.0.", True), ("model.layers.1.", False), ("mtp.layers.0.", 0)):
        mtp = at.startswith("mtp")
        if linear:
            m.put(at + "linear_attn.in_proj_qkvz", 384, H, keep=True)
            m.put(at + "linear_attn.in_proj_ba", 32, H, keep=True)
            m.put(at + "linear_attn.conv1d", 256, 1, 4)
            m.vector(at + "linear_attn.A_log", 4)
            m.put(at + "linear_attn.out_proj", H, H, keep=True)
        else:
            m.attention(at + "self_attn.", keep=True)
        m.put(at + "mlp.gate", E, H, keep=True)
        m.put(at + "mlp.shared_expert_gate", 1, H, keep=True)
        m.mlp(at + "mlp.shared_expert.", I, keep=True)
        m.experts(at + "mlp.experts.")
        m.norms(at)
        if mtp:
            m.made.keeps |= {n.removesuffix(".weight") for n, x in m.made.tensors.items()
                             if n.startswith(at) and x.ndim == 2}  # fmt: skip
    m.put("mtp.fc", H, 2 * H, keep=True)
    return m.made


def qwen3_5_moe() -> Made:
    """Plain stacks; in_proj_qkv and in_proj_z are fused, in_proj_b and in_proj_a too."""
    m = Maker(_nested("qwen3_5_moe", moe_intermediate_size=I, num_experts=E,
                      shared_expert_intermediate_size=I))  # fmt: skip
    m.ends("model.language_model.")
    for n in (0, 1):
        at = f"model.language_model.layers.{n}."
        if n == 0:
            for leaf, rows in (("in_proj_qkv", 256), ("in_proj_z", H), ("in_proj_b", 16),
                               ("in_proj_a", 16)):  # fmt: skip
                m.put(f"{at}linear_attn.{leaf}", rows, H, keep=True)
            m.put(at + "linear_attn.out_proj", H, H, keep=True)
        else:
            m.attention(at + "self_attn.", keep=True)
        m.put(at + "mlp.gate", E, H, keep=True)
        m.put(at + "mlp.shared_expert_gate", 1, H, keep=True)
        m.mlp(at + "mlp.shared_expert.", I, keep=True)
        m.stacked(at + "mlp.experts.gate_up_proj", at + "mlp.experts.down_proj")
        m.norms(at)
    m.put("model.visual.blocks.0.attn.qkv", 96, 32, keep=True)
    m.put("mtp.fc", H, 2 * H, keep=True)
    return m.made


def qwen3_vl_moe() -> Made:
    """Transposed stacks."""
    m = Maker(_nested("qwen3_vl_moe", moe_intermediate_size=I, intermediate_size=D, num_experts=E))
    m.ends("model.language_model.")
    at = "model.language_model.layers.0."
    m.attention(at + "self_attn.")
    m.put(at + "mlp.gate", E, H, keep=True)
    m.stacked(at + "mlp.experts.gate_up_proj", at + "mlp.experts.down_proj", transposed=True)
    m.norms(at)
    m.put("model.visual.blocks.0.mlp.linear_fc1", 96, 32, keep=True)
    return m.made


def gemma4() -> Made:
    """Plain stacks beside a dense MLP; k and no v in full attention; inputs of every layer."""
    m = Maker(_nested("gemma4", moe_intermediate_size=I, intermediate_size=D, num_experts=E,
                      top_k_experts=2))  # fmt: skip
    m.ends("model.language_model.", "")
    m.put("model.language_model.embed_tokens_per_layer", V, 64, keep=True)
    m.put("model.language_model.per_layer_model_projection", 64, H)
    for n in (0, 1):
        at = f"model.language_model.layers.{n}."
        m.attention(at + "self_attn.", keep=True, v=n == 0)
        m.mlp(at + "mlp.")
        m.put(at + "router.proj", E, H, keep=True)
        m.vector(at + "router.scale", H)
        m.vector(at + "router.per_expert_scale", E)
        m.stacked(at + "experts.gate_up_proj", at + "experts.down_proj")
        m.put(at + "per_layer_input_gate", 32, H)
        m.put(at + "per_layer_projection", H, 32)
        m.norms(at)
    m.put("model.vision_tower.encoder.layers.0.self_attn.q_proj.linear", 96, 32, keep=True)
    m.put("model.embed_vision.embedding_projection", H, 96, keep=True)
    return m.made


def llama4() -> Made:
    """Transposed stacks under feed_forward, beside a shared expert."""
    m = Maker(_nested("llama4", intermediate_size=I, intermediate_size_mlp=D, num_local_experts=E))
    m.ends("language_model.model.", "language_model.lm_head")
    for n in (0, 1):
        at = f"language_model.model.layers.{n}."
        m.attention(at + "self_attn.", keep=True)
        if n == 0:
            m.mlp(at + "feed_forward.")
        else:
            m.put(at + "feed_forward.router", E, H, keep=True)
            m.mlp(at + "feed_forward.shared_expert.", I)
            m.stacked(at + "feed_forward.experts.gate_up_proj",
                      at + "feed_forward.experts.down_proj", transposed=True)  # fmt: skip
        m.norms(at)
    m.put("vision_model.model.layers.0.self_attn.q_proj", 96, 32, keep=True)
    m.put("multi_modal_projector.linear_1", H, 96, keep=True)
    return m.made


def aria() -> Made:
    """Transposed stacks called fc1 and fc2, in modules."""
    m = Maker(_nested("aria", intermediate_size=I, moe_num_experts=E, moe_num_shared_experts=1))
    m.ends("language_model.model.", "language_model.lm_head")
    at = "language_model.model.layers.0."
    m.attention(at + "self_attn.")
    m.put(at + "mlp.router", E, H, keep=True)
    m.mlp(at + "mlp.shared_experts.", I)
    m.stacked(at + "mlp.experts.fc1.weight", at + "mlp.experts.fc2.weight", transposed=True,
              parent=at + "mlp.experts")  # fmt: skip
    m.norms(at)
    m.put("vision_tower.encoder.layers.0.mlp.fc1", 96, 32, keep=True)
    m.put("multi_modal_projector.cross_attn.q_proj", H, 96, keep=True)
    return m.made


def granitemoe(model_type: str) -> Made:
    """Stacks under other names; where it has one, a shared MLP is fused already."""
    m = Maker(_config(model_type, intermediate_size=I, num_local_experts=E,
                      shared_intermediate_size=D))  # fmt: skip
    m.ends(head="")
    for n in (0, 1):
        at = f"model.layers.{n}."
        m.attention(at + "self_attn.")
        m.put(at + "block_sparse_moe.router.layer", E, H, keep=True)
        m.stacked(at + "block_sparse_moe.input_linear.weight",
                  at + "block_sparse_moe.output_linear.weight",
                  parent=at + "block_sparse_moe.experts")  # fmt: skip
        if model_type != "granitemoe":
            m.put(at + "shared_mlp.input_linear", 2 * D, H)
            m.put(at + "shared_mlp.output_linear", H, D)
        m.norms(at)
    return m.made


def gpt_oss() -> Made:
    """Transposed stacks with biases, gate and up by turns."""
    m = Maker(_config("gpt_oss", intermediate_size=I, num_local_experts=E))
    m.ends()
    for n in (0, 1):
        at = f"model.layers.{n}."
        m.attention(at + "self_attn.", keep=True)
        m.vector(at + "self_attn.sinks", 4)
        m.vector(at + "self_attn.q_proj.bias", H)
        m.put(at + "mlp.router", E, H, keep=True)
        m.stacked(at + "mlp.experts.gate_up_proj", at + "mlp.experts.down_proj", transposed=True,
                  interleaved=True, bias=True)  # fmt: skip
        m.norms(at)
    return m.made


def nemotron_h() -> Made:
    """Mamba, attention and MLPs without a gate, each a mixer."""
    m = Maker(_config("nemotron_h", intermediate_size=D, moe_intermediate_size=I,
                      n_routed_experts=E, hybrid_override_pattern="M-*E"))  # fmt: skip
    m.put("backbone.embeddings", V, H, keep=True)
    m.put("backbone.norm_f", H)
    m.put("lm_head", V, H, keep=True)
    at = "backbone.layers."
    m.put(at + "0.mixer.in_proj", 2 * H, H)
    m.put(at + "0.mixer.conv1d", 256, 1, 4)
    m.put(at + "0.mixer.out_proj", H, H)
    m.vector(at + "0.mixer.A_log", 4)
    m.put(at + "1.mixer.up_proj", D, H)
    m.put(at + "1.mixer.down_proj", H, D)
    m.attention(at + "2.mixer.", keep=True)
    m.put(at + "3.mixer.gate", E, H, keep=True)
    m.put(at + "3.mixer.fc1_latent_proj", 64, H, keep=True)
    for e in range(E):
        m.put(f"{at}3.mixer.experts.{e}.up_proj", I, 64)
        m.put(f"{at}3.mixer.experts.{e}.down_proj", 64, I)
    m.put("mtp.layers.0.mixer.q_proj", H, H, keep=True)
    for n in range(4):
        m.put(f"{at}{n}.norm", H)
    return m.made


def deepseek_v4() -> Made:
    """Short names; in FP4 the routed experts and nothing else."""
    m = Maker(_config("deepseek_v4", moe_intermediate_size=I, n_routed_experts=E))
    m.put("embed", V, H, keep=True)
    m.put("norm", H)
    m.put("head", V, H, keep=True)
    m.vector("hc_head_fn", 4, H)
    for at in ("layers.0.", "layers.1.", "mtp.0."):
        for leaf, rows, cols in (("wq_a", LORA, H), ("wq_b", H, LORA), ("wkv", 64, H),
                                 ("wo_a", 64, 64), ("wo_b", H, 64)):  # fmt: skip
            m.put(f"{at}attn.{leaf}", rows, cols, keep=True)
        for leaf in ("wkv", "wgate"):
            m.put(f"{at}attn.compressor.{leaf}", 64, H, keep=True)
        m.put(at + "attn_norm", H)
        m.put(at + "ffn_norm", H)
        m.vector(at + "hc_attn_fn", 4, H)
        m.put(at + "ffn.gate", E, H, keep=True)
        m.experts(at + "ffn.experts.", "w1 w3 w2")
        m.mlp(at + "ffn.shared_experts.", I, "w1 w3 w2", keep=True)
    m.put("mtp.0.e_proj", H, H, keep=True)
    m.put("mtp.0.h_proj", H, H, keep=True)
    return m.made


FAMILIES: dict[str, Callable[[], Made]] = {
    "llama": lambda: dense("llama"),
    "qwen3": lambda: dense("qwen3"),
    "mistral": lambda: dense("mistral"),
    "unheard_of": lambda: dense("unheard_of"),
    "phi3": phi3,
    "qwen3_moe": qwen3_moe,
    "mixtral": mixtral,
    "minimax_m2": minimax_m2,
    "deepseek_v3": lambda: deepseek("deepseek_v3"),
    "deepseek_v32": lambda: deepseek("deepseek_v32"),
    "kimi_k2": lambda: deepseek("kimi_k2"),
    "glm_moe_dsa": lambda: deepseek("glm_moe_dsa"),
    "kimi_k25": kimi_k25,
    "kimi_linear": kimi_linear,
    "qwen3_next": qwen3_next,
    "qwen3_5_moe": qwen3_5_moe,
    "qwen3_vl_moe": qwen3_vl_moe,
    "gemma4": gemma4,
    "llama4": llama4,
    "aria": aria,
    "granitemoe": lambda: granitemoe("granitemoe"),
    "granitemoehybrid": lambda: granitemoe("granitemoehybrid"),
    "gpt_oss": gpt_oss,
    "nemotron_h": nemotron_h,
    "deepseek_v4": deepseek_v4,
}
