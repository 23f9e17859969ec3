"""The command that compiles kernels ahead."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from .group import cli
from .options import complete_folder, complete_format, complete_scheme, quiet_option


@cli.command()
@click.option("--scheme", "-s", multiple=True, metavar="NAME", shell_complete=complete_scheme,
              help="Only those of this scheme (default: all schemes). Repeatable.")  # fmt: skip
@click.option("--format", "-f", "formats", multiple=True, metavar="NAME",
              shell_complete=complete_format,
              help="Only those of this format (default: all formats). Repeatable.")  # fmt: skip
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(["bf16", "f16", "f32"]),
              help="Only those of weights of this dtype (default: all). Repeatable.")  # fmt: skip
@click.option("--scales", type=click.Choice(["absmax", "search"]), default="absmax",
              show_default=True, help="Those that `convert --scales` asks for.")  # fmt: skip
@click.option("--numerics", type=click.Choice(["f32", "weight"]), default="f32",
              show_default=True, help="Those that `convert --numerics` asks for.")  # fmt: skip
@click.option("--into", type=click.Path(), metavar="DIR", shell_complete=complete_folder,
              help="Put them there, to be shipped and used with NUMBA_CACHE_DIR=DIR (default: "
                   "where this installation looks for them).")  # fmt: skip
@quiet_option
def kernels(
    scheme: tuple[str, ...], formats: tuple[str, ...], dtypes: tuple[str, ...], scales: str,
    numerics: str, into: str | None, quiet: bool,
) -> None:  # fmt: skip
    """Compile the CPU kernels for this machine ahead, so that no conversion has to.

    What is there already stays. docs/edge.md says how to ship the result, and to what.
    """
    from contextlib import nullcontext
    from dataclasses import replace

    from streamq import ahead
    from streamq.compiled import COUNTS, home, only_in
    from streamq.errors import WriteError
    from streamq.kernels import cpu

    todo, before = ahead.cases(scheme, formats, dtypes), replace(COUNTS)
    with only_in(Path(into, "streamq")) if into is not None else nullcontext():
        if into is not None and home(Path(cpu.__file__).parent) is None:
            raise WriteError(f"{into}: cannot be written to (read-only, or no permission).")
        with (
            TemporaryDirectory(prefix="streamq-") as scratch,
            click.progressbar(todo, label="compiling", file=sys.stderr, hidden=quiet) as bar,
        ):
            for case in bar:
                ahead.run(case, Path(scratch), scales, numerics)
            if not scheme and not formats:
                ahead.compress(Path(scratch))
    done = COUNTS - before
    if done.kept < done.compiled:
        lost = done.compiled - done.kept
        raise WriteError(
            f"{lost} of {done.compiled} kernels could not be kept, as no place for them can be "
            "written; give one with --into."
        )
    if not quiet:
        click.echo(f"{done.compiled} kernels compiled, {done.loaded} were there")
        if into is not None:
            click.echo(f"use them with NUMBA_CACHE_DIR={into}")
