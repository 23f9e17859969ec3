"""The model card of an output on the Hub: what it was made of and how, and what it lost.

It holds no times, paths or names of machines: two runs write the same card.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isinf

from streamq.checkpoint import Checkpoint
from streamq.hub import is_hub, parse_hub
from streamq.hub.card import card_text, is_model, metadata_of, validate
from streamq.planning import Plan, format_name, numbers_text
from streamq.quality import Quality
from streamq.schemes import Scheme
from streamq.tensors import size_text
from streamq.trust import VERSION
from streamq.writer import CARD, HubPlace

from .places import Output

#: Commands that serve or load what a format is for; {0} is the repository.
_LOADED = {
    "mlx": "mlx_lm.generate --model {0} --prompt Hello",
    "ascend": "vllm serve {0} --quantization ascend",
    **dict.fromkeys(
        ("compressed-tensors", "modelopt", "fp8", "awq", "gptq", "gpt-oss", "plain"),
        "vllm serve {0}",
    ),
}


def card_of(source: Checkpoint, output: Output, quality: Quality | None) -> str:
    """The text of README.md. ``quality``: what the weights lost, where it was measured."""
    assert isinstance(output.dst, HubPlace)
    plan, fmt = output.plan, format_name(output.plan)
    kept = metadata_of(_card_of(source))
    base = _base_model(source, output.dst)
    schemes = _schemes(plan)
    bits = sorted({f"{s.bits}-bit" for s in schemes if not s.is_float})
    tags = ["streamq", "quantized", fmt, *(s.name.lower() for s in schemes), *bits]
    body = "\n".join(_body(output, output.dst, base, quality))
    library = "mlx" if fmt == "mlx" else "transformers"
    return card_text(base, dict.fromkeys(tags), library, kept, body)


def check_card(source: Checkpoint, output: Output) -> None:
    """Raise HubError for an output whose card the Hub would refuse, at the very end."""
    if isinstance(output.dst, HubPlace):
        validate(card_of(source, output, None), str(output.dst.branch))


def _body(
    output: Output, place: HubPlace, base: str | None, quality: Quality | None
) -> Iterator[str]:
    plan, repo = output.plan, place.branch.path.repo
    of = f"[{base}](https://huggingface.co/{base})" if base else "a checkpoint"
    yield f"# {repo.partition('/')[2]}"
    yield ""
    yield (
        f"{of[0].upper() + of[1:]} with its weights in {plan.scheme_names}, made by streamq "
        f"{VERSION} without calibration data."
    )
    if base:
        yield "What the model is for, and what it is not for, is said there."
    yield from ("", "| scheme | numbers | weights | size |", "|---|---|---|---|")
    named = {s.name: numbers_text(s) for s in _schemes(plan) if not s.is_float}
    for name, (count, size) in plan.schemes.items():
        yield f"| {name} | {named.get(name, 'floats')} | {count} | {size_text(size)} |"
    left = sum(t.nbytes for t, _ in plan.unquantized)
    yield f"| as they were | | {len(plan.unquantized)} | {size_text(left)} |"
    yield ""
    yield (
        f"Format {format_name(plan)}; {size_text(plan.bytes_in)} before, "
        f"{size_text(plan.bytes_out)} now, {plan.bytes_in / plan.bytes_out:.2f} times smaller."
    )
    if quality:
        yield from _lost(quality)
    if (command := _LOADED.get(format_name(plan))) is not None:
        revision = "" if place.branch.branch == "main" else f" --revision {place.branch.branch}"
        yield from _shell("Load", command.format(repo) + revision * command.startswith("vllm"))
    if place.upload.command is not None:
        yield from _shell("Made by", place.upload.command)
    yield from _shell(
        "Check", f"hf download {repo} --local-dir DIR && streamq verify DIR",
        "streamq.json has the options, fingerprints of the source, and checksums of every file but "
        "this one.",
    )  # fmt: skip
    yield ""


def _lost(quality: Quality) -> Iterator[str]:
    """Figures of the weights alone: no text was generated for them."""
    yield from ("", "## What the weights lost", "", "| modules | count | SQNR |", "|---|---|---|")
    for kind, (count, db) in quality.by_kind().items():
        yield f"| {kind} | {count} | {_db(db)} |"
    yield f"| all | | {_db(quality.total)} |"
    yield from ("", "Energy of the weights over that of their errors. No model was run for this.")


def _db(value: float) -> str:
    return "exact" if isinf(value) and value > 0 else f"{value:.2f} dB"


def _shell(title: str, command: str, text: str = "") -> Iterator[str]:
    yield from ("", f"## {title}", "", "```sh", command, "```")
    if text:
        yield from ("", text)


def _schemes(plan: Plan) -> list[Scheme]:
    """The schemes that weights got, or had already."""
    found = dict.fromkeys(w.scheme for shard in plan.shards for w in shard.weights)
    return list(found) or [plan.options.scheme] * plan.verbatim


def _base_model(source: Checkpoint, place: HubPlace) -> str | None:
    """What the source is called on the Hub, where anybody says so."""
    if place.upload.base_model is not None:
        return place.upload.base_model
    if is_hub(source.place):
        return parse_hub(source.place).repo
    name = source.config.get("_name_or_path")
    return str(name) if is_model(name) else None


def _card_of(source: Checkpoint) -> str | None:
    """The card of the source, whose text is not that of the output."""
    if CARD not in source.others:
        return None
    return (source.root / CARD).read_text("utf-8", errors="replace")
