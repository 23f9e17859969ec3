"""Which modules stay unquantized: for every model, and by model type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from streamq.schemes import ALL, Scheme


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
         "*vision_adapter*", "*aligner*", "*patch_merge_mlp*"),
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
        ("*.attn.*", "*.self_attn.*", "*.shared_experts.*", "*.e_proj", "*.h_proj"),
        ("deepseek_v4",), when="fp4",
    ),
    LeftAlone("indexer projection", ("*.indexers_proj",), ("glm_moe_dsa",)),
    LeftAlone(
        "attention and MTP",
        ("*.self_attn.*", "*.indexer.*", MTP_LAYERS), ("glm_moe_dsa",), when="fp4",
    ),
    LeftAlone(
        "attention", ("*.self_attn.*",),
        ("minimax_m2", "minimax_m3", "minimax_m3_vl", "gemma4", "gemma4_unified", "llama4"),
        when="fp4",
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
    "glm4_moe",
)  # fmt: skip


def applies(row: LeftAlone, scheme: Scheme) -> bool:
    """Whether a row is about this scheme."""
    if row.when == "fp4":
        return scheme.element == "e2m1"
    if row.when == "not_fp8_block":
        return not (scheme.element == "e4m3" and scheme.block[0] not in (1, ALL))
    return True
