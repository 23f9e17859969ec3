"""Targets for the size of an output, and the command that writes the recipe for one."""

from __future__ import annotations

from typing import Any

import click

from .group import cli
from .options import options_of, scheme_options, settings_of, size, together

#: The options that choose schemes by size.
target_options = together(
    click.option("--target-size", callback=size, metavar="SIZE",
                 help="Choose the schemes of least error for shards of this size together."),
    click.option("--target-bits", type=click.FloatRange(1, 16), metavar="X",
                 help="Choose them for so many bits a quantized weight, scales included."),
    click.option("--candidates", metavar="NAME[:GROUP],...",
                 help="What targets choose from (default: w3a16 to w8a16, groups of 32 to "
                      "128)."),
)  # fmt: skip


def is_allocated(o: dict[str, Any]) -> bool:
    """Whether the command line names a target."""
    if o["target_size"] is not None and o["target_bits"] is not None:
        raise click.UsageError("--target-size and --target-bits do not go together.")
    wanted = o["target_size"] is not None or o["target_bits"] is not None
    if o["candidates"] and not wanted:
        raise click.UsageError("--candidates needs --target-size or --target-bits.")
    return wanted


def refuse_beside_target(o: dict[str, Any]) -> None:
    """Wrong usage: a target chooses the schemes itself."""
    for name in ("scheme", "recipe", "group_size"):
        if o[name]:
            option = "--" + name.replace("_", "-")
            raise click.UsageError(f"{option} does not go with a target; --candidates does.")


def allocated(source: Any, o: dict[str, Any]) -> tuple[Any, list[str]]:
    """The Options that a target leads to, and sentences about how."""
    from dataclasses import replace

    from streamq.allocate import CANDIDATES, allocate, candidates_of
    from streamq.converting import default_workers
    from streamq.progress import progress

    names = o["candidates"].split(",") if o["candidates"] else CANDIDATES
    candidates = candidates_of(names, o["scales"])
    options = options_of(o, candidates[0].name)
    with progress(source.nbytes, "measuring", o.get("quiet", False) or o["as_json"]) as advance:
        recipe, said = allocate(
            source, options, candidates, bits=o["target_bits"], size=o["target_size"],
            workers=settings_of(o).workers or default_workers(), progress=advance,
        )  # fmt: skip
    return replace(options, scheme=recipe.schemes[0], recipe=recipe), said


@cli.command()
@click.argument("src", type=click.Path())
@scheme_options
@target_options
@click.option("--output", "-o", type=click.Path(), metavar="FILE",
              help="Where to write the recipe (default: standard output).")  # fmt: skip
def allocate(src: str, output: str | None, **o: Any) -> None:
    """Print the recipe that a target for the size of SRC leads to.

    It can be read, edited and given to `streamq convert --recipe`.
    """
    from pathlib import Path

    from streamq.checkpoint import open_checkpoint

    if not is_allocated(o):
        raise click.UsageError("Missing option '--target-size' or '--target-bits'.")
    refuse_beside_target(o)
    o |= {"to": (), "quiet": True}
    with open_checkpoint(src) as source:
        options, said = allocated(source, o)
    for line in said:
        click.echo(f"note: {line}", err=True)
    if output:
        Path(output).write_text(options.recipe.text, encoding="utf-8")
    else:
        click.echo(options.recipe.text, nl=False)
