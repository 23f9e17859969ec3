"""One conversion by another tool: ``python bench/peers.py PEER SRC DST SCHEME``.

Run by the interpreter of that peer's environment; ``PEERS`` says which schemes it has.
Each keeps the embedding and the head as they are, rounds to the nearest, uses no data.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

IGNORE = ["lm_head", "re:.*embed_tokens$"]


def llmcompressor(src: str, dst: str, scheme: str) -> None:
    """llm-compressor's model_free_ptq on the CPU."""
    from llmcompressor import model_free_ptq

    model_free_ptq(
        model_stub=src, save_directory=dst, scheme=scheme.upper(), ignore=IGNORE,
        max_workers=2, device="cpu",
    )  # fmt: skip


def autoround(src: str, dst: str, scheme: str) -> None:
    """auto-round's model-free mode, without its search for better scales."""
    command = Path(sys.executable).with_name("auto-round")
    options = ["--asym"] if scheme.endswith("_asym") else []
    preset = scheme.upper().removesuffix("_ASYM")
    if preset.startswith("MX"):  # compiling cost more than it saved on 1 GB
        preset = preset.removesuffix("A16")
        options = ["--disable_torch_compile"]
    environment = os.environ | {"AR_MODEL_FREE_SHARD_PARALLELISM": "2"}
    subprocess.run(
        [command, "--model_free", "--disable_opt_rtn", "--device", "cpu", "--model", src,
         "--scheme", preset, "--output_dir", dst, *options],
        check=True, env=environment,
    )  # fmt: skip


def quark(src: str, dst: str, scheme: str) -> None:
    """AMD Quark file to file, in one process: two at once were no faster on two cores."""
    from quark.torch import ModelQuantizer
    from quark.torch.quantization.config import config as q

    def row(spec: Any, **options: Any) -> Any:
        return spec(ch_axis=-1, is_dynamic=False, **options)

    weight = {
        "nvfp4a16": lambda: q.ScaleQuantSpec(
            row(q.FP4PerGroupSpec, group_size=16, scale_type="float32"),
            q.FP8E4M3PerTensorSpec(
                observer_method="min_max", is_dynamic=False, scale_type="float32"
            ),
        ),
        "mxfp4a16": lambda: row(q.OCP_MXFP4Spec),
        "fp8_dynamic": lambda: q.FP8E4M3PerChannelSpec(ch_axis=0, is_dynamic=False),
        "w4a16": lambda: row(q.Int4PerGroupSpec, group_size=128),
        "w4a16_asym": lambda: row(q.Uint4PerGroupSpec, group_size=128, symmetric=False),
        "w8a16": lambda: row(q.Int8PerGroupSpec, group_size=128, symmetric=True),
        "w8a8": lambda: q.Int8PerChannelSpec(ch_axis=0, symmetric=True, is_dynamic=False),
    }[scheme]().to_quantization_spec()
    config = q.QConfig(q.QLayerConfig(weight=weight), exclude=["lm_head", "*embed_tokens*"])
    ModelQuantizer(config).direct_quantize_checkpoint(src, dst, device="cpu")


def mlx(src: str, dst: str, scheme: str) -> None:
    """What mlx_lm.convert does, less the tokenizer; affine has a bf16 bias for a zero point."""
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    mode, bits, group = {
        "nvfp4a16": ("nvfp4", 4, 16),
        "mxfp4a16": ("mxfp4", 4, 32),
        "mxfp8a16": ("mxfp8", 8, 32),
        "w4a16_asym": ("affine", 4, 128),
    }[scheme]
    model, config = load_model(Path(src), lazy=True)
    model, config = quantize_model(
        model, config, group, bits, mode=mode,
        quant_predicate=lambda path, _: not path.endswith(("lm_head", "embed_tokens")),
    )  # fmt: skip
    save_model(dst, model, donate_model=True)
    save_config(config, Path(dst, "config.json"))


#: name: (what runs it, directory of its environment below .oracle, its schemes)
PEERS = {
    "llm-compressor": (llmcompressor, "llmc", ("nvfp4a16", "fp8_block", "fp8_dynamic", "mxfp4a16",
                                               "mxfp8a16", "w4a16", "w4a16_asym", "w8a16", "w8a8")),
    "auto-round": (autoround, "autoround", ("w2a16", "w4a16", "w4a16_asym", "w8a16", "mxfp4a16",
                                            "mxfp8a16")),
    "quark": (quark, "quark", ("nvfp4a16", "fp8_dynamic", "mxfp4a16", "w4a16", "w4a16_asym",
                               "w8a16", "w8a8")),
    "mlx-lm": (mlx, "mlx", ("nvfp4a16", "mxfp4a16", "mxfp8a16", "w4a16_asym")),
}  # fmt: skip


if __name__ == "__main__":
    PEERS[sys.argv[1]][0](*sys.argv[2:])
