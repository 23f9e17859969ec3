"""Write a small random llama checkpoint: ``python examples/tiny_llama.py DIR``.

Two layers in two shards, q and k of the second layer in one, v in the other, as large
checkpoints have it: about 11 MB in bf16.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY, HEADS, KV_HEADS = 512, 1536, 2, 512, 8, 4


def tensors() -> dict[str, np.ndarray]:
    """All tensors, in the order of the model; rows vary in size as trained ones do."""
    rng = np.random.default_rng(0)

    def weight(rows: int, cols: int) -> np.ndarray:
        row_scale = rng.lognormal(0, 0.5, (rows, 1))
        return (rng.standard_normal((rows, cols)) * 0.02 * row_scale).astype(ml_dtypes.bfloat16)

    norm = np.ones(HIDDEN, ml_dtypes.bfloat16)
    kv = HIDDEN * KV_HEADS // HEADS
    made = {"model.embed_tokens.weight": weight(VOCABULARY, HIDDEN)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        made |= {
            layer + "input_layernorm.weight": norm,
            layer + "self_attn.q_proj.weight": weight(HIDDEN, HIDDEN),
            layer + "self_attn.k_proj.weight": weight(kv, HIDDEN),
            layer + "self_attn.v_proj.weight": weight(kv, HIDDEN),
            layer + "self_attn.o_proj.weight": weight(HIDDEN, HIDDEN),
            layer + "post_attention_layernorm.weight": norm,
            layer + "mlp.gate_proj.weight": weight(INTERMEDIATE, HIDDEN),
            layer + "mlp.up_proj.weight": weight(INTERMEDIATE, HIDDEN),
            layer + "mlp.down_proj.weight": weight(HIDDEN, INTERMEDIATE),
        }
    return made | {"model.norm.weight": norm, "lm_head.weight": weight(VOCABULARY, HIDDEN)}


def main(folder: Path) -> None:
    """Write shards, index and config."""
    folder.mkdir(parents=True, exist_ok=True)
    made = tensors()
    names = list(made)
    cut = names.index("model.layers.1.self_attn.v_proj.weight")
    weight_map = {}
    for i, part in enumerate((names[:cut], names[cut:]), 1):
        file = f"model-{i:05d}-of-00002.safetensors"
        save_file({n: made[n] for n in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.nbytes for t in made.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "hidden_act": "silu",
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
