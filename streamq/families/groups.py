"""Which weights loaders concatenate: they share one scheme and, for NVFP4, one global scale."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FusedGroup:
    """Modules under one parent that loaders concatenate; some may be absent.

    A group that names ``model_types`` takes its members from the general groups there.
    Where loaders of different models fuse different subsets of the same names, the row
    is their union: sharing a scale with one more member is harmless, not sharing is not.
    """

    name: str
    members: tuple[str, ...]
    model_types: tuple[str, ...] = ()


FUSED_GROUPS = (
    FusedGroup("qkv", ("q_proj", "k_proj", "v_proj")),
    FusedGroup("qkv", ("query", "key", "value")),
    FusedGroup("qkv", ("q", "k", "v")),
    FusedGroup("qkv", ("to_q", "to_k", "to_v")),
    FusedGroup("qkv", ("wq", "wk", "wv")),
    FusedGroup("gate_up", ("gate_proj", "up_proj", "dense_h_to_4h")),
    FusedGroup("gate_up", ("w1", "w3")),
    FusedGroup("gate_up", ("w1", "w2"), ("qwen",)),
    FusedGroup("gate_up", ("c_fc_0", "c_fc_1")),
    FusedGroup("gate_up", ("fc1", "fc3")),
    FusedGroup("qkv_a", ("q_a_proj", "kv_a_proj_with_mqa")),
    FusedGroup("qkv_a", ("q_a_proj", "kv_a_proj_with_mqa", "g_proj"), ("kimi_k3", "dots3")),
    FusedGroup("qkv_a", ("wq_a", "wkv_a_with_mqa", "wkv", "wgate")),
    FusedGroup("qkvz", ("in_proj_qkv", "in_proj_z")),
    FusedGroup("ba", ("in_proj_b", "in_proj_a")),
    FusedGroup(
        "qkv_gates",
        ("q_proj", "k_proj", "v_proj", "g_proj", "b_proj", "f_a_proj", "g_a_proj"),
        ("kimi_linear", "glm5", "glm5_next", "bailing_moe_linear", "bailing_hybrid", "olmo_hybrid"),
    ),
)
