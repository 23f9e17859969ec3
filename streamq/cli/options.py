"""Options that several commands share, and what they mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    from pathlib import Path

    from streamq.checkpoint import Checkpoint


def size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Bytes from a number with a unit: 512MiB, 5GB, 1.5GiB. Anything else is wrong usage."""
    if value is None:
        return None
    from streamq.tables import bytes_of

    try:
        return bytes_of(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a size like 512MiB or 5GB") from None


def _spool(ctx: click.Context, param: click.Parameter, value: str) -> None:
    """A size, or 0."""
    ctx.meta["streamq.spool"] = 0 if value.strip() == "0" else size(ctx, param, value)


def _spool_dir(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    ctx.meta["streamq.spool_dir"] = value


def device(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """What ``device_names`` knows. Anything else is wrong usage."""
    from streamq.errors import PlanError
    from streamq.pipeline.names import device_names

    try:
        device_names(value)
    except PlanError as e:
        raise click.BadParameter(str(e)) from None
    return value


def engine(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """What ``address_of`` knows. Anything else is wrong usage."""
    from streamq.engines import address_of
    from streamq.errors import PlanError

    try:
        address_of(value)
    except PlanError as e:
        raise click.BadParameter(str(e)) from None
    return value


def ranks(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...]:
    """Numbers of ranks from 2,4,8."""
    parts = value.split(",") if value else []
    if not all(part.strip().isdigit() and int(part) > 1 for part in parts):
        raise click.BadParameter(f"{value!r} is not numbers above one, such as 2,4,8")
    return tuple(int(part) for part in parts)


def complete_scheme(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """For a shell: names of schemes that go on from ``incomplete``, in its case."""
    from streamq.schemes import ALIASES, OF_FORMATS, PLAIN, SCHEMES

    names = sorted([*SCHEMES, *OF_FORMATS, *PLAIN, *ALIASES])
    upper = incomplete.isupper()
    return [n if upper else n.lower() for n in names if n.startswith(incomplete.upper())]


def complete_format(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """For a shell: names of formats that begin so."""
    from streamq.formats import FORMATS

    return [name for name in FORMATS if name.startswith(incomplete)]


def complete_folder(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """For a shell, which knows its directories."""
    return [CompletionItem(incomplete, type="dir")]


#: Adds options to a command.
Decorator = Callable[[Callable[..., None]], Callable[..., None]]


def together(*options: Decorator) -> Decorator:
    """One decorator for several, which --help lists in this order."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


dst_argument = click.argument(
    "dst", type=click.Path(), required=False, shell_complete=complete_folder
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
quiet_option = click.option("--quiet", "-q", is_flag=True, help="Print errors only.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Print the plan and stop.")

#: What work is done with; no byte of an output depends on it.
machine_options = together(
    click.option("--workers", "-j", type=click.IntRange(1, 256), metavar="N",
                 help="Threads (default: the processors)."),
    click.option("--max-memory", callback=size, default="512MiB", show_default=True,
                 metavar="SIZE", help="Buffers of all workers together."),
)  # fmt: skip

#: For sources on the Hub (docs/hub.md); ``open_source`` knows what was given.
source_options = together(
    click.option("--spool", callback=_spool, default="4GiB", show_default=True, metavar="SIZE",
                 expose_value=False,
                 help="Disk for what of a source on the Hub is needed twice; 0 for none."),
    click.option("--spool-dir", callback=_spool_dir, type=click.Path(), metavar="DIR",
                 expose_value=False, help="Where that is (default: TMPDIR, or /var/tmp)."),
)  # fmt: skip

#: How DST comes to be.
output_options = together(
    click.option("--overwrite", is_flag=True, help="Replace DST, once the new one is complete."),
    click.option("--no-sync", is_flag=True, help="Do not wait for the disk before DST appears."),
)

#: The same where an interrupted run goes on.
resumed_options = together(
    output_options,
    click.option("--restart", is_flag=True,
                 help="Discard what an interrupted run left in DST.partial."),
    click.option("--sha256", is_flag=True,
                 help="Note that of every file in streamq.json as well."),
    click.option("--limit-rate", callback=size, metavar="SIZE",
                 help="Read and write at most so many bytes a second, together."),
)  # fmt: skip

#: What decides the bytes of an output beside its scheme and format.
detail_options = together(
    click.option("--gpt-fast-names", is_flag=True, default=None,
                 help="Names of gpt-fast, with q, k and v in one, for the format gpt-fast."),
    click.option("--scale-fmt", type=click.Choice(["ue8m0"]),
                 help="Scales that are powers of two, for the format fp8."),
    click.option("--group-size", type=int, metavar="N",
                 help="Columns that share a scale, for integer group schemes (default 128; "
                      "-1: whole rows)."),
    click.option("--group-dim", type=click.IntRange(0, 1), metavar="0|1",
                 help="Axis that groups run along, for the format group (default 1)."),
    click.option("--scales", type=click.Choice(["absmax", "search"]), default="absmax",
                 show_default=True,
                 help="From the largest magnitude, or searched for the least error."),
    click.option("--requantize", is_flag=True,
                 help="Also convert weights that are quantized to another scheme already."),
    click.option("--ignore", multiple=True, metavar="PATTERN",
                 help="Leave these modules as they are; a glob, or re:REGEX. Repeatable."),
    click.option("--only", multiple=True, metavar="PATTERN",
                 help="Quantize only these modules; a glob, or re:REGEX. Repeatable."),
    click.option("--check-tp", callback=ranks, metavar="N,N,...",
                 help="Warn of blocks and groups that so many tensor-parallel ranks would "
                      "cut, such as 2,4,8."),
    click.option("--numerics", type=click.Choice(["f32", "weight"]), default="f32",
                 show_default=True,
                 help="Arithmetic in f32, or in the weight's dtype as llm-compressor does."),
    click.option("--input-scale", type=float, default=1.0, show_default=True, metavar="X",
                 help="The constant input_global_scale of NVFP4 (2688 / largest activation)."),
    click.option("--shard-size", callback=size, metavar="SIZE",
                 help="Largest output shard (default: as many shards as the source)."),
)  # fmt: skip

#: The same options for plan and convert.
scheme_options = together(
    click.option("--scheme", "-s", metavar="NAME", shell_complete=complete_scheme,
                 help="Preset, any case: nvfp4, nvfp4a16, fp8_dynamic, fp8_block, mxfp4, "
                      "mxfp8, w4a16, w4a16_asym, w8a8, ..."),
    click.option("--recipe", type=click.Path(), metavar="FILE",
                 help="Rules that give modules their schemes, in TOML or YAML "
                      "(docs/recipes.md); --scheme is then for the rest."),
    click.option("--format", "-f", "format_", metavar="NAME", shell_complete=complete_format,
                 help="What loaders it is for; `streamq formats` lists them "
                      "(default: compressed-tensors)."),
    detail_options,
    machine_options,
    json_option,
)  # fmt: skip

#: What a conversion runs on.
device_options = together(
    click.option("--device", callback=device, default="cpu", show_default=True, metavar="NAME",
                 help="What quantizes: cpu, cuda, cuda:0,cuda:1 and so on, npu likewise, or "
                      "auto for what is faster, CPU or GPU (docs/gpu.md)."),
    click.option("--device-memory", callback=size, metavar="SIZE",
                 help="Memory to use on each device (default: 3/4 of what is free)."),
)  # fmt: skip

#: Where a conversion runs.
engine_option = click.option(
    "--engine", callback=engine, default="local", show_default=True, metavar="NAME",
    help="What runs it: this process, or the nodes of a Ray cluster, as ray, ray:auto, "
         "ray:HOST:PORT or ray:ray://HOST:PORT (docs/ray.md).",
)  # fmt: skip

#: Options that formats have of their own.
FORMAT_OPTIONS = ("gpt_fast_names", "scale_fmt", "group_dim")


def options_of(o: dict[str, Any], scheme: str | None, fmt: str | None = None) -> Any:
    """The planner's Options of a command line, for one scheme and format."""
    from streamq.api import options
    from streamq.formats import named
    from streamq.schemes import has_groups

    names = ("group_size", "scales", "ignore", "only", "numerics", "input_scale", "shard_size",
             "requantize", "recipe", "check_tp")  # fmt: skip
    if scheme and o["to"] and not has_groups(scheme):
        o = {**o, "group_size": None}  # for those of several outputs that have groups
    if o["to"]:
        has = named(fmt).options if fmt else ()
        o = {**o, **{k: None for k in FORMAT_OPTIONS if k not in has}}
    return options(
        scheme, format=fmt or o["format_"], **{k: o[k] for k in names},
        **{k: o[k] for k in FORMAT_OPTIONS if k in o},
    )  # fmt: skip


def settings_of(o: dict[str, Any], progress: Any = None, notify: Any = None) -> Any:
    """The Settings of a command line."""
    from streamq.converting import Settings

    details = o.get("page") is not None
    return Settings(
        workers=o["workers"], max_memory=o["max_memory"], sync=not o.get("no_sync", False),
        overwrite=o.get("overwrite", False), stats=o.get("stats", False) or details,
        details=details, progress=progress, notify=notify, restart=o.get("restart", False),
        sha256=o.get("sha256", False), device=o.get("device", "cpu"),
        device_memory=o.get("device_memory"), limit_rate=o.get("limit_rate"),
    )  # fmt: skip


def say_of(o: dict[str, Any]) -> Callable[[str], None]:
    """What takes sentences for people: nobody where only errors, or JSON, were asked for."""
    return (lambda line: None) if o["quiet"] or o["as_json"] else click.echo


def open_source(src: str | Path, **how: Any) -> Checkpoint:
    """Open a source, which may be on the Hub, as the options of the command say."""
    from streamq.checkpoint import open_checkpoint

    said = click.get_current_context().meta
    how |= {"spool": said["streamq.spool"], "spool_dir": said["streamq.spool_dir"]}
    return open_checkpoint(src, **how)
