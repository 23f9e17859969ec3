"""The group of commands: expected failures become one sentence and an exit code."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from streamq.errors import StreamqError

INTERRUPTED = 130
#: Characters of a message; what a source says may be in it, and may be of any length.
_LONGEST = 2000


#: Options by their names here, under the head that help puts them below, after all others.
SECTIONS = {
    "Machine": (
        "workers",
        "max_memory",
        "max_disk",
        "device",
        "device_memory",
        "engine",
        "limit_rate",
    ),
    "Hub": ("spool", "spool_dir", "private", "branch", "create_pr", "work_dir"),
    "Output": ("dry_run", "overwrite", "no_sync", "restart", "sha256"),
    "Messages": ("check_tp", "stats", "page", "as_json", "quiet"),
}


class _Command(click.Command):
    """One whose help has sections, where it has many options."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, by section."""
        options = [p for p in self.get_params(ctx) if isinstance(p, click.Option)]
        of = {name: head for head, names in SECTIONS.items() for name in names}
        for head in ("Options", *SECTIONS):
            rows = [
                row for p in options
                if (of.get(p.name or "", "Options") if len(options) > 9 else "Options") == head
                and (row := p.get_help_record(ctx))
            ]  # fmt: skip
            if rows:
                with formatter.section(head):
                    formatter.write_dl(rows)


class _Group(click.Group):
    """Turns expected failures into one sentence and an exit code."""

    command_class = _Command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; 1 for an error, 3 for a failed verification, 130 for Ctrl-C."""
        try:
            return super().invoke(ctx)
        except StreamqError as e:
            _tell(f"Error: {e}", e)
            sys.exit(e.exit_code)
        except KeyboardInterrupt as e:
            _tell("Interrupted.", e)
            sys.exit(INTERRUPTED)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except OSError as e:
            _tell(f"Error: {e.filename or 'standard output'}: {e.strerror}.", e)
            sys.exit(1)
        except Exception as e:
            if os.environ.get("STREAMQ_DEBUG"):
                raise
            click.echo(
                f"Error: {type(e).__name__}: {e}. This is a bug in streamq; please report it with "
                "the output of the same command under STREAMQ_DEBUG=1.",
                err=True,
            )
            sys.exit(1)


def _tell(text: str, error: BaseException) -> None:
    """A failure on stderr, with what was noted about the state it left."""
    for line in (text, *getattr(error, "__notes__", ())):
        click.echo(line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ...", err=True)


_SETTINGS = {
    "help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True,
}  # fmt: skip


@click.group(cls=_Group, context_settings=_SETTINGS)
@click.version_option(package_name="streamq")
def cli() -> None:
    """Quantize checkpoints of any size without building the model.

    `streamq COMMAND --help` has the options and examples of a command. SIZE is a number with a
    unit, such as 512MiB or 5GB; PATTERN is a glob, or re: and a regex.

    \b
    Exit codes: 0 done, 1 error, 2 wrong usage, 3 verification failed, 130 interrupted.

    \b
    Environment:
      NUMBA_CACHE_DIR=DIR   where compiled kernels are looked for first, and kept
      STREAMQ_ASCENDC=DIR   where the kernels for NPUs are looked for
      STREAMQ_DEBUG=1       a traceback for what is a bug in streamq
      HF_TOKEN, HF_ENDPOINT, HF_HOME
                            login, address and cache of the Hub, as huggingface_hub has them
      RAY_ADDRESS           the cluster of --engine ray
      _STREAMQ_COMPLETE=bash_source, zsh_source or fish_source
                            print what a shell needs to complete commands, and stop
    """
