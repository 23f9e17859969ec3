"""What help says of each command beside its docstring: a line for the list, examples at the end.

Tests run the examples; SRC and the like stand for checkpoints there.
"""

from __future__ import annotations

import click

SHORT = {
    "allocate": "Print the recipe that a target size leads to.",
    "batch": "Convert many checkpoints.",
    "compress": "Compress a checkpoint, to be stored or for the 310P.",
    "convert": "Quantize a checkpoint.",
    "decompress": "Undo what compress did.",
    "formats": "List the formats, who loads them, their schemes.",
    "inspect": "Show what a checkpoint is.",
    "kernels": "Compile the CPU kernels ahead.",
    "plan": "Show what a conversion would do.",
    "reindex": "Re-shard, fuse, split, rename; without quantizing.",
    "repair": "Mend what loaders would stumble over.",
    "report": "Show what the weights lost, tensor by tensor.",
    "verify": "Check a quantized checkpoint.",
}

EXAMPLES = {
    "allocate": """
        streamq allocate SRC --target-bits 4.6 -o recipe.toml
        streamq allocate SRC --target-size 2GB --candidates w3a16,w4a16:64,w8a16
    """,
    "batch": """
        streamq batch jobs.toml --jobs 2
        streamq batch models.txt -s nvfp4 --out 'out/{org}/{name}-{scheme}' --continue-on-error
        streamq batch models.txt -s nvfp4,fp8_block --out 'hf://org/{name}-{scheme}' --dry-run
    """,
    "compress": """
        streamq compress SRC DST
        streamq compress SRC --dry-run
        streamq compress SRC DST --sparsity magnitude:0.5
    """,
    "convert": """
        streamq convert SRC DST --scheme nvfp4a16
        streamq convert SRC DST -s w4a16_asym -f awq --group-size 64 --stats
        streamq convert SRC DST --recipe recipe.toml --report DST.html
        streamq convert SRC --to nvfp4:OUT-NVFP4 --to gptq/w4a16:OUT-GPTQ
        streamq convert hf://org/model hf://org/model-nvfp4 -s nvfp4 --private
    """,
    "decompress": """
        streamq decompress PACKED DST
    """,
    "formats": """
        streamq formats
        streamq formats --json
    """,
    "inspect": """
        streamq inspect SRC
        streamq inspect model.safetensors --json
    """,
    "kernels": """
        streamq kernels
        streamq kernels -s w4a16 -s nvfp4a16 --into kernels
    """,
    "plan": """
        streamq plan SRC DST --scheme fp8_block
        streamq plan SRC --recipe recipe.toml --json
        streamq plan SRC --target-size 2GB
    """,
    "reindex": """
        streamq reindex SRC DST
        streamq reindex SRC DST --fuse --shard-size 5GB
        streamq reindex SRC DST --rename '^model\\.=model.language_model.'
    """,
    "repair": """
        streamq repair BAD FIXED
        streamq repair BAD --dry-run
    """,
    "report": """
        streamq report QUANTIZED --source SRC
        streamq report QUANTIZED --source SRC --json
    """,
    "verify": """
        streamq verify QUANTIZED
        streamq verify QUANTIZED --source SRC --report verified.html
        streamq verify QUANTIZED --check-tp 2,4 --json
    """,
}


def add_to(group: click.Group) -> None:
    """Give the commands of a group what is said of them here."""
    for name, text in EXAMPLES.items():
        lines = [f"  {line.strip()}" for line in text.strip().splitlines()]
        group.commands[name].epilog = "\n".join(["\b", "Examples:", *lines])
        group.commands[name].short_help = SHORT[name]
