"""Train the example: ``python examples/train.py`` (needs torch; half an hour on two cores).

A llama that reads bytes: 1.9 million parameters, 3.8 MB in bf16. Written as the Hub has
checkpoints, in two shards that cut through the q, k and v of the second layer.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from text import text
from torch.nn import functional as F

HERE = Path(__file__).parent / "bytes-llama"
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256,
    "intermediate_size": 512, "num_hidden_layers": 3, "vocab_size": 256,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "hidden_act": "silu",
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}  # fmt: skip
CONTEXT, BATCH, STEPS, WARM_UP, PEAK = 256, 16, 900, 50, 3e-3
CUT = "model.layers.1.self_attn.k_proj.weight"  # first tensor of the second shard


def new_weights() -> dict[str, torch.Tensor]:
    """Names and shapes of the checkpoint, initialized for training in f32."""
    hidden, inter, heads, kv, head = (
        CONFIG[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads",
                            "num_key_value_heads", "head_dim")
    )  # fmt: skip
    layers = CONFIG["num_hidden_layers"]
    made = {"model.embed_tokens.weight": torch.randn(256, hidden) * 0.02}

    def linear(rows: int, cols: int, depth: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, cols) * 0.02 / math.sqrt(depth)

    for i in range(layers):
        layer = f"model.layers.{i}."
        made |= {
            layer + "input_layernorm.weight": torch.ones(hidden),
            layer + "self_attn.q_proj.weight": linear(heads * head, hidden),
            layer + "self_attn.k_proj.weight": linear(kv * head, hidden),
            layer + "self_attn.v_proj.weight": linear(kv * head, hidden),
            layer + "self_attn.o_proj.weight": linear(hidden, heads * head, 2 * layers),
            layer + "post_attention_layernorm.weight": torch.ones(hidden),
            layer + "mlp.gate_proj.weight": linear(inter, hidden),
            layer + "mlp.up_proj.weight": linear(inter, hidden),
            layer + "mlp.down_proj.weight": linear(hidden, inter, 2 * layers),
        }
    made |= {"model.norm.weight": torch.ones(hidden), "lm_head.weight": linear(256, hidden)}
    return {name: t.requires_grad_() for name, t in made.items()}


def forward(w: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """Logits f32 ``[batch, length, 256]`` of byte values ``[batch, length]``."""
    n = tokens.shape[1]
    heads, kv, head = (
        CONFIG[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )  # fmt: skip
    frequency = CONFIG["rope_theta"] ** (-torch.arange(0, head, 2) / head)
    angle = torch.outer(torch.arange(n), frequency).repeat(1, 2)
    cos, sin = angle.cos(), angle.sin()

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), w[name], CONFIG["rms_norm_eps"])

    def split(x: torch.Tensor, count: int) -> torch.Tensor:
        return x.view(*x.shape[:2], count, head).transpose(1, 2)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    x = w["model.embed_tokens.weight"][tokens]
    for i in range(CONFIG["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        h = norm(x, layer + "input_layernorm.weight")
        q, k, v = (F.linear(h, w[f"{layer}self_attn.{p}_proj.weight"]) for p in "qkv")
        a = F.scaled_dot_product_attention(
            rotate(split(q, heads)), rotate(split(k, kv)), split(v, kv),
            is_causal=True, enable_gqa=True,
        )  # fmt: skip
        a = a.transpose(1, 2).flatten(2)
        x = x + F.linear(a, w[layer + "self_attn.o_proj.weight"])
        h = norm(x, layer + "post_attention_layernorm.weight")
        gate = F.silu(F.linear(h, w[layer + "mlp.gate_proj.weight"]))
        up = F.linear(h, w[layer + "mlp.up_proj.weight"])
        x = x + F.linear(gate * up, w[layer + "mlp.down_proj.weight"])
    return F.linear(norm(x, "model.norm.weight"), w["lm_head.weight"])


def train() -> dict[str, torch.Tensor]:
    """Weights after all steps: AdamW, cosine schedule, random windows of the text."""
    torch.manual_seed(0)
    data = torch.from_numpy(text(held_out=False).astype("int64"))
    w = new_weights()
    matrices = [t for t in w.values() if t.ndim == 2]
    vectors = [t for t in w.values() if t.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    began = time.perf_counter()
    for step in range(STEPS):
        done = max(0, step - WARM_UP) / (STEPS - WARM_UP)
        rate = PEAK * min(1, (step + 1) / WARM_UP) * (0.05 + 0.475 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(data) - CONTEXT - 1, (BATCH, 1))
        window = data[starts + torch.arange(CONTEXT + 1)]
        logits = forward(w, window[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(w.values()), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == STEPS - 1:
            bits = loss.item() / math.log(2)
            print(f"{step:5d}  {bits:.3f} bits a byte  {time.perf_counter() - began:.0f} s")
            sys.stdout.flush()
    return {name: t.detach().bfloat16() for name, t in w.items()}


def write(weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Shards, index and config."""
    folder.mkdir(exist_ok=True)
    names = list(weights)
    cut = names.index(CUT)
    weight_map = {}
    for i, part in enumerate((names[:cut], names[cut:]), 1):
        file = f"model-{i:05d}-of-00002.safetensors"
        save_file({n: weights[n] for n in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.nbytes for t in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")


if __name__ == "__main__":
    write(train(), HERE)
