"""Which tensors belong together, and which stay as they are: one table each.

A loader concatenates the members of a fused group, so they share one scheme and, for
NVFP4, one global scale. Grouping, planning and verification all read this file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import translate
from typing import Any, Literal

from streamq.errors import PlanError
from streamq.schemes import ALL, Scheme


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
        ("kimi_linear", "glm5", "bailing_moe_linear", "bailing_hybrid", "olmo_hybrid"),
    ),
)


@dataclass(frozen=True, slots=True)
class LeftAlone:
    """Modules that stay unquantized.

    ``patterns``: globs over module names (``*`` crosses dots). ``when``: "fp4" for e2m1
    schemes only, "not_fp8_block" for all but 128x128 FP8.
    """

    reason: str
    patterns: tuple[str, ...]
    model_types: tuple[str, ...] = ()
    when: Literal["always", "fp4", "not_fp8_block"] = "always"


#: A pattern that stands for the multi-token-prediction layers behind num_hidden_layers.
MTP_LAYERS = "<layers behind num_hidden_layers>"

_MLA = ("*.q_a_proj", "*.q_b_proj", "*.kv_a_proj_with_mqa", "*.kv_b_proj", "*.indexer.*")

LEFT_ALONE = (
    LeftAlone("norm", ("*norm", "*norm[0-9]", "*.ln_[0-9]", "*layernorm*")),
    LeftAlone(
        "embedding",
        ("*embed_tokens", "*embed_tokens_per_layer", "*embeddings", "*embedding", "*.wte", "wte",
         "*.wpe", "wpe", "*.embed", "embed", "*.embed_in", "*.tok_embeddings",
         "*position_embeddings*", "*relative_attention_bias"),
    ),
    LeftAlone("output head", ("lm_head", "*.lm_head", "output", "embed_out", "head", "*.score")),
    LeftAlone(
        "router",
        ("*.mlp.gate", "*.router", "*.router.proj", "*.router.layer", "*.router.classifier",
         "*.block_sparse_moe.gate", "*.mixer.gate", "*.feed_forward.gate", "*.moe.gate",
         "*.ffn.gate", "*.shared_expert_gate", "*.e_score_correction_bias"),
    ),
    LeftAlone("MTP projection", ("*.eh_proj", "*.mtp_linear_proj")),
    LeftAlone("indexer", ("*.indexer.weights_proj", "*.indexer.wk")),
    LeftAlone("convolution", ("*.conv1d", "*.conv")),
    LeftAlone("compressor", ("*.compressor.wkv", "*.compressor.wgate")),
    LeftAlone("hyper-connection", ("*.hc_*", "hc_*", "*.input_mix*", "*_res_proj")),
    LeftAlone(
        "vision or audio tower",
        ("*vision_tower*", "*vision_model*", "*visual.*", "visual*", "*vision_encoder*",
         "*audio_tower*", "*audio_model*", "*audio_encoder*", "*image_encoder*", "*patch_embed*"),
    ),
    LeftAlone(
        "projector",
        ("*multi_modal_projector*", "*mm_projector*", "*embed_vision*", "*embed_audio*",
         "*vision_adapter*", "*aligner*"),
    ),
    LeftAlone("MLA kv_b", ("*.kv_b_proj",), when="not_fp8_block"),
    LeftAlone(
        "mamba",
        ("*.mixer.in_proj", "*.mixer.x_proj", "*.mixer.dt_proj", "*.mixer.out_proj"),
        ("mamba", "falcon_mamba"),
    ),
    LeftAlone("classifier", ("*classifier",), ("longcat_flash", "longcat")),
    LeftAlone(
        "linear attention gates",
        ("*.in_proj_a", "*.in_proj_b", "*.in_proj_ba", "mtp*"),
        ("qwen3_next", "qwen3_5", "qwen3_5_moe"),
    ),
    LeftAlone(
        "attention and shared expert",
        ("*.self_attn.*", "*.linear_attn.*", "*.shared_expert.*"),
        ("qwen3_next", "qwen3_5", "qwen3_5_moe"), when="fp4",
    ),
    LeftAlone(
        "MLA and MTP", (*_MLA, MTP_LAYERS), ("deepseek_v3", "deepseek_v32", "kimi_k2"), when="fp4"
    ),
    LeftAlone(
        "all but the routed experts",
        ("*.self_attn.*", "*.shared_experts.*", "*.mlp.gate_proj", "*.mlp.up_proj",
         "*.mlp.down_proj"),
        ("kimi_k25", "kimi_k3"),
    ),
    LeftAlone(
        "all but the routed experts",
        ("*.attn.*", "*.self_attn.*", "*.shared_experts.*"), ("deepseek_v4",), when="fp4",
    ),
    LeftAlone("indexer projection", ("*.indexers_proj",), ("glm_moe_dsa",)),
    LeftAlone(
        "attention and MTP",
        ("*.self_attn.*", "*.indexer.*", MTP_LAYERS), ("glm_moe_dsa",), when="fp4",
    ),
    LeftAlone(
        "attention", ("*.self_attn.*",),
        ("minimax_m2", "minimax_m3", "gemma4", "llama4"), when="fp4",
    ),
    LeftAlone(
        "attention and latent projections",
        ("*.q_proj", "*.k_proj", "*.v_proj", "*.o_proj", "*_latent_proj", "mtp*"), ("nemotron_h",),
    ),
    LeftAlone("attention", ("*.self_attn.*",), ("gpt_oss",)),
)  # fmt: skip


#: Model types for which the generic rules are known to be all that is needed.
GENERIC = (
    "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2",
    "gemma3_text", "phi", "phi3", "deepseek_v2", "granite", "olmo2", "olmoe", "starcoder2",
    "cohere", "falcon", "gpt_neox", "glm4", "smollm3", "ernie4_5", "hunyuan_v1_dense", "seed_oss",
)  # fmt: skip


def matcher(patterns: Iterable[str]) -> Callable[[str], bool]:
    """One test for several patterns over module names: globs, or ``re:`` and a regex.

    A regex must match from the start, as ``re.match`` does in the readers of ``ignore``.
    Raises PlanError for a regex that does not compile.
    """
    tests = [_compile(p) for p in patterns]
    return lambda name: any(t.match(name) for t in tests)


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        if pattern.startswith("re:"):
            return re.compile(pattern[3:])
        return re.compile(translate(pattern))
    except re.error as e:
        raise PlanError(f"the pattern {pattern!r} is not a valid regex: {e}.") from None


_NUMBERS = re.compile(r"\.[0-9]+(?![^.])")


def collapse(name: str) -> str:
    """``model.layers.12.mlp`` as ``model.layers.*.mlp``: what layers have in common."""
    return _NUMBERS.sub(".*", name)


class Family:
    """What is known about one model, from its config.json."""

    def __init__(self, config: dict[str, Any]) -> None:
        text = config.get("text_config")
        self._config = {**config, **(text if isinstance(text, dict) else {})}
        self.model_type = str(config.get("model_type") or "")
        layers = self._config.get("num_hidden_layers")
        self._layers = layers if isinstance(layers, int) else None
        groups = [g for g in FUSED_GROUPS if not g.model_types]
        groups += [g for g in FUSED_GROUPS if self.model_type in g.model_types]
        self._group = {member: g for g in groups for member in g.members}
        rows = [r for r in LEFT_ALONE if not r.model_types or self.model_type in r.model_types]
        self._left_alone = [(r, matcher(p for p in r.patterns if p != MTP_LAYERS)) for r in rows]
        rows_of_its_own = (*FUSED_GROUPS, *LEFT_ALONE)
        self.known = self.model_type in GENERIC or any(
            self.model_type in row.model_types for row in rows_of_its_own
        )

    def group_of(self, module: str) -> tuple[str, FusedGroup] | None:
        """The fused group of a module and the parent it lies under, or None."""
        parent, _, leaf = module.rpartition(".")
        group = self._group.get(leaf)
        return None if group is None else (parent, group)

    def left_alone(self, scheme: Scheme) -> Callable[[str], str | None]:
        """A function from a module to the reason why it stays unquantized, or None.

        Layers have their modules in common, so each answer is found once per collapsed name.
        """
        rows = [(row, test) for row, test in self._left_alone if _applies(row, scheme)]
        mtp = next((row.reason for row, _ in rows if MTP_LAYERS in row.patterns), None)
        known: dict[str, str | None] = {}

        def why(module: str) -> str | None:
            if mtp is not None and self._is_mtp(module):
                return mtp
            name = collapse(module)
            if name not in known:
                known[name] = next((row.reason for row, test in rows if test(name)), None)
            return known[name]

        return why

    def _is_mtp(self, module: str) -> bool:
        if self._layers is None:
            return False
        found = re.search(r"(?:^|\.)layers\.(\d+)(?:\.|$)", module)
        return found is not None and int(found[1]) >= self._layers


def _applies(row: LeftAlone, scheme: Scheme) -> bool:
    if row.when == "fp4":
        return scheme.element == "e2m1"
    if row.when == "not_fp8_block":
        return not (scheme.element == "e4m3" and scheme.block[0] not in (1, ALL))
    return True


_EXPERT_STACKS = re.compile(
    r"(^|\.)(gate_up_proj|down_proj|gate_proj|up_proj|input_linear|output_linear|w[123])(\.weight)?$"
)


def is_expert_stack(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor looks like the weights of all experts of a layer in one."""
    return len(shape) == 3 and _EXPERT_STACKS.search(name) is not None
