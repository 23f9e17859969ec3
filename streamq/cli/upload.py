"""Options for outputs on the Hub, and the command line as their cards tell it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from .options import size, together

if TYPE_CHECKING:
    from streamq.converting import Upload
    from streamq.writer import Place

#: Which branch of the Hub an output goes to, and from where.
branch_options = together(
    click.option("--private", is_flag=True,
                 help="Make the repository hf://org/repo private, where it is not there yet."),
    click.option("--branch", metavar="NAME",
                 help="Branch of the repository (default: main); made of main if need be."),
    click.option("--create-pr", is_flag=True,
                 help="Open a pull request there instead of committing."),
    click.option("--work-dir", type=click.Path(), metavar="DIR",
                 help="Where shards on their way to the Hub lie (default: beside its cache)."),
)  # fmt: skip

#: How an output comes to the Hub.
upload_options = together(
    branch_options,
    click.option("--base-model", metavar="ORG/REPO",
                 help="What the model card names as the source, where SRC does not say it."),
    click.option("--max-disk", callback=size, metavar="SIZE",
                 help="Shards on their way to the Hub at a time (default: three of the largest)."),
)  # fmt: skip
_NAMES = ("private", "branch", "create_pr", "base_model", "work_dir", "max_disk")
#: Options that decide bytes, or what becomes of weights; a card leaves out all others.
_TOLD = (
    "recipe", "gpt_fast_names", "scale_fmt", "group_size", "group_dim", "scales", "requantize",
    "ignore", "only", "numerics", "input_scale", "shard_size", "target_size", "target_bits",
    "candidates",
)  # fmt: skip


def upload_of(o: dict[str, Any]) -> Upload:
    """The Upload of a command line."""
    from streamq.converting import Upload

    folder = None if o["work_dir"] is None else Path(o["work_dir"])
    return Upload(**{**{name: o[name] for name in _NAMES}, "work_dir": folder})


def places_of(
    src: str, wanted: Sequence[tuple[str | None, str | None, str | None]], o: dict[str, Any]
) -> list[Place]:
    """Where outputs go; ``wanted``: scheme, format and destination of each."""
    from streamq.hub import is_hub
    from streamq.writer import place_of, refuse_unused

    if any(is_hub(dst or "") for _, _, dst in wanted):
        # huggingface_hub would write a bar for each file into ours; it looks when it is imported.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    upload = upload_of(o)
    found = []
    for scheme, fmt, dst in wanted:
        told = replace(upload, command=_command(src, dst or "", scheme, fmt or o["format_"]))
        found.append(place_of(dst or "", told))
    refuse_unused(upload, found)
    return found


def _command(src: str, dst: str, scheme: str | None, fmt: str | None) -> str:
    """What makes the same output, without what only this machine has."""
    words = ["streamq", "convert", _public(src), dst]
    words += ["--scheme", scheme] if scheme else []
    words += ["--format", fmt] if fmt else []
    return shlex.join([*words, *_told()])


def _told() -> Iterator[str]:
    context = click.get_current_context()
    for param in context.command.params:
        value = context.params.get(str(param.name))
        given = context.get_parameter_source(str(param.name)) is ParameterSource.COMMANDLINE
        if param.name not in _TOLD or not given:
            continue
        for one in value if isinstance(value, tuple) else [value]:
            yield max(param.opts, key=len)
            if one is not True:
                yield Path(str(one)).name if param.name == "recipe" else str(one)


def _public(src: str) -> str:
    """A source, but of a local one no more than its name."""
    from streamq.hub import is_hub

    return src if is_hub(src) else Path(src).resolve().name
