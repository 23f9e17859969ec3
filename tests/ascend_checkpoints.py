"""A small mixture of experts for Ascend, and checkpoints as others wrote them."""

import json
import re

import ml_dtypes
import numpy as np
from click.testing import CliRunner
from helpers import tensors_of, write_checkpoint

from streamq.cli import cli
from streamq.formats import named
from streamq.tensors import DTYPES

BF16 = ml_dtypes.bfloat16
ASCEND, CT = named("ascend"), named("compressed-tensors")
FILE = "quant_model_description.json"
LAYER = "model.layers.0."
Q, GATE, UP, DOWN = (LAYER + p for p in (
    "self_attn.o_proj", "mlp.experts.0.gate_proj", "mlp.experts.0.up_proj",
    "mlp.experts.0.down_proj"))  # fmt: skip
CONFIG = {"model_type": "qwen3_moe", "num_hidden_layers": 1, "dtype": "bfloat16", "num_experts": 2,
          "hidden_size": 128, "moe_intermediate_size": 64}  # fmt: skip


def weight(name, *shape):
    rng = np.random.default_rng(list(name.encode()))
    size = rng.lognormal(-4, 1, (shape[0], 1))
    return (rng.standard_normal(shape) * size).astype(BF16)


def moe():
    """Attention, two experts, a router, an embedding that is the head too."""
    shapes = {
        "model.embed_tokens": (32, 128), LAYER + "self_attn.q_proj": (128, 128),
        LAYER + "self_attn.k_proj": (64, 128), LAYER + "self_attn.v_proj": (64, 128),
        Q: (128, 128), LAYER + "mlp.gate": (2, 128),
    }  # fmt: skip
    for e in (0, 1):
        at = f"{LAYER}mlp.experts.{e}."
        shapes |= {at + "gate_proj": (64, 128), at + "up_proj": (64, 128),
                   at + "down_proj": (128, 64)}  # fmt: skip
    made = {name + ".weight": weight(name, *shape) for name, shape in shapes.items()}
    return made | {LAYER + "input_layernorm.weight": np.ones(128, BF16)}


def arrays_of(folder):
    return {name: np.frombuffer(raw, DTYPES[t.dtype].numpy).reshape(t.shape)
            for name, (t, raw) in tensors_of(folder).items()}  # fmt: skip


def description(folder):
    return json.loads((folder / FILE).read_text())


def run(*args):
    return CliRunner().invoke(cli, [*map(str, args)])


def refused(message, *args):
    """Exit code 1 and one sentence; a second says what was left where work had begun."""
    result = run(*args)
    assert result.exit_code == 1, result.stderr or result.exception
    line, *more = result.stderr.splitlines()
    assert all("was not written" in note for note in more)
    assert re.search(f"^Error: .*{message}", line), line
    assert line.endswith(".")
    assert "bug" not in line


def others(type_, parts, extra=(), head=None, name=Q):
    """A checkpoint of one weight in a type, from its tensors by suffix."""
    tensors = {f"{name}.{suffix}": x for suffix, x in parts.items()}
    tensors |= {"model.norm.weight": np.ones(64, BF16), "lm_head.weight": weight("h", 16, 64)}
    said = {"model_quant_type": type_, "version": "1.0.0", **(head or {})}
    said |= {n: type_ if n.startswith(name + ".") else "FLOAT" for n in tensors} | dict(extra)
    return tensors, said


def write(folder, tensors, said, config=None, file=FILE):
    config = CONFIG if config is None else config
    write_checkpoint(folder, tensors, {k: v for k, v in config.items() if "expert" not in k})
    (folder / file).write_text(json.dumps(said))
    return folder
