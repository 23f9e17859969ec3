"""One conversion by another tool: ``python bench/peers.py PEER SRC DST SCHEME``.

Run by the interpreter of that peer's environment; ``PEERS`` says which schemes it has.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

IGNORE = ["lm_head", "re:.*embed_tokens$"]


def llmcompressor(src: str, dst: str, scheme: str) -> None:
    """llm-compressor's model_free_ptq on the CPU."""
    from llmcompressor import model_free_ptq

    model_free_ptq(
        model_stub=src, save_directory=dst, scheme=scheme.upper(), ignore=IGNORE,
        max_workers=2, device="cpu",
    )  # fmt: skip


def autoround(src: str, dst: str, scheme: str) -> None:
    """auto-round's model-free mode."""
    command = Path(sys.executable).with_name("auto-round")
    subprocess.run(
        [command, "--model_free", "--model", src, "--scheme", scheme.upper(), "--output_dir", dst],
        check=True,
    )


#: name: (what runs it, directory of its environment below .oracle, its schemes)
PEERS = {
    "llm-compressor": (llmcompressor, "llmc", ("nvfp4a16", "fp8_block", "fp8_dynamic", "mxfp4a16",
                                               "mxfp8a16", "w4a16", "w4a16_asym", "w8a16", "w8a8")),
    "auto-round": (autoround, "autoround", ("w4a16", "w8a16", "mxfp4")),
}  # fmt: skip


if __name__ == "__main__":
    PEERS[sys.argv[1]][0](*sys.argv[2:])
