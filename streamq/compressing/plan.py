"""Everything that can be known before the work."""

from __future__ import annotations

import json
from collections.abc import Iterator

from streamq.checkpoint import COMPRESSED, INDEX_SUFFIX, Checkpoint, read_json
from streamq.errors import CheckpointError, PlanError
from streamq.families import matcher
from streamq.formats.ascend_description import FILE, FLOAT, Description, build, model_type
from streamq.tensors import DTYPES, TensorInfo
from streamq.trust import RECORD

from .choose import SMALL_SAID, SPARSE, Choice, chooser, described
from .layout import Entry, header_of
from .ranks import Ranks
from .types import Item, Options, Plan, Run, Shard, mode_of


def make_plan(source: Checkpoint, options: Options) -> Plan:
    """Decide what is compressed and how. Raises PlanError, naming the tensor, for what cannot be.

    The shards of the output are those of the source, or with ``tp`` one for each rank.
    """
    told = described(source) if options.codec == "ascend" or options.keep is not None else None
    place, said = told or (FILE, None)
    choose = chooser(source, options, said)
    chosen = {t.name: choose(t) for t in source.tensors.values()}
    if options.tp is None:
        by_file: dict[str, list[TensorInfo]] = {file: [] for file in source.files}
        for t in source.tensors.values():
            by_file[t.file].append(t)
        shards = [_shard(source, f, found, options, chosen) for f, found in by_file.items()]
    else:
        ranks = Ranks(source, options.tp)
        shards = [_rank(ranks, r, options, chosen) for r in range(options.tp)]
    texts, restore = {}, {}
    index = _index(source) if options.tp is None else None
    if index is not None:
        restore[index] = _text(source, index)
    if options.tp is None and options.keep is None and _is_whole(source):
        restore[RECORD] = _text(source, RECORD)
    kind = "zstd"
    if options.codec == "ascend":
        new = _description(source, said, chosen)
        kind = str(new.head["model_quant_type"])
        texts[FILE] = json.dumps(new.as_json(), indent=2, ensure_ascii=False) + "\n"
        if said is not None:
            restore[place] = _text(source, place)
    warnings = _warnings(source, options, chosen)
    return Plan(
        options=options,
        shards=shards,
        index=index,
        texts=texts,
        restore=restore,
        others=source.others,
        other_bytes=source.other_bytes,
        kind=kind,
        bytes_in=sum(item.nbytes for shard in shards for item in shard.items),
        warnings=warnings,
        notes=[*source.oddities],
    )


def _shard(
    source: Checkpoint, file: str, found: list[TensorInfo], options: Options,
    chosen: dict[str, Choice],
) -> Shard:  # fmt: skip
    """A file of the source as it is, in the order of its data."""
    length = bytearray(8)
    source.pread(file, 0, memoryview(length))
    header = bytearray(8 + int.from_bytes(length, "little"))
    source.pread(file, 0, memoryview(header))
    items = [_item(t, chosen[t.name], options) for t in found]
    metadata = {**source.metadata[file], COMPRESSED: options.codec}
    return Shard(file, bytes(header), items, metadata)


def _item(t: TensorInfo, choice: Choice, options: Options) -> Item:
    rows = t.shape[0] if len(t.shape) == 2 and DTYPES[t.dtype].bits >= 8 else 1
    width = t.nbytes // rows if rows else 0
    runs = (Run(t.file, t.start, rows, width, width),)
    transpose = options.transpose and choice.coding != "raw" and len(t.shape) == 2
    return Item(
        t.name, t.dtype, t.shape, t.start, runs, choice.coding, transpose, choice.keep, choice.why
    )


def _rank(ranks: Ranks, rank: int, options: Options, chosen: dict[str, Choice]) -> Shard:
    """The file of a rank, the widest elements first."""
    pieces = sorted(ranks.pieces(rank), key=lambda p: -DTYPES[p.dtype].itemsize)
    metadata = {"format": "pt"}
    header = header_of([Entry(p.name, p.dtype, p.shape) for p in pieces], metadata)
    items, at = [], len(header)
    for p in pieces:
        choice = _one_of([(t.name, chosen[t.name]) for t in p.members])
        item = Item(
            p.name, p.dtype, p.shape, at, p.runs, choice.coding,
            options.transpose and choice.coding != "raw" and len(p.shape) == 2, choice.keep,
            choice.why,
        )  # fmt: skip
        if item.tiling is None and (mode_of(item.coding) or item.keep is not None):
            raise PlanError(
                f"{p.name!r} has the shape {list(p.shape)} on each rank, too little for tiles of "
                "NZ; choose fewer ranks, or --disable-layers."
            )
        items.append(item)
        at += item.nbytes
    name = f"model-rank-{rank}-part-0.safetensors"
    return Shard(name, header, items, {**metadata, COMPRESSED: options.codec})


def _one_of(members: list[tuple[str, Choice]]) -> Choice:
    """How a fused tensor is stored: as its members, of which small ones are like any other."""
    (a, first), *others = [m for m in members if m[1].why != SMALL_SAID] or members
    for b, other in others:
        if other.coding != first.coding and a.endswith(".weight"):
            raise PlanError(
                f"{a!r} is {_said(first)} and {b!r} {_said(other)}, but --tp fuses them; give them "
                "one type."
            )
    return first


def _said(choice: Choice) -> str:
    return "compressed" if choice.coding != "raw" else f"stored as it is ({choice.why})"


def _description(
    source: Checkpoint, said: Description | None, chosen: dict[str, Choice]
) -> Description:
    """What loaders are told: compressed weights under their names before any fusing."""
    compressed = {name: choice for name, choice in chosen.items() if choice.coding != "raw"}
    to = {old: new for old, (new, *_) in SPARSE.items()}
    if said is None:
        # Loaders look for a head that is tied to the embedding as well.
        types = dict.fromkeys([*source.tensors, "lm_head.weight"], FLOAT)
        of = dict.fromkeys(compressed, to["W16A16S"])
    else:
        types = dict(said.types)
        of = {name: to[types[name]] for name in compressed}
        modules = {name.removesuffix(".weight") for name in compressed}
        types |= {
            name: to[kind] for name, kind in types.items()
            if kind in to and name.rpartition(".")[0] in modules
        }  # fmt: skip
    for name, kind in of.items():
        base = name.removesuffix("weight")
        types |= {name: kind, f"{base}index": kind, f"{base}info": kind}
    if said is None:
        return build(types)
    return Description(types, {**said.head, "model_quant_type": model_type(types.values())})


def _index(source: Checkpoint) -> str | None:
    """The name of the index that the source was opened by, None without one."""
    found = sorted(path.name for path in source.root.glob("*" + INDEX_SUFFIX))
    usual = "model" + INDEX_SUFFIX
    name = usual if usual in found else found[0] if found else None
    if name is None:
        return None
    homes = read_json(source.root / name).get("weight_map")
    # A single file may have been opened beside it.
    return name if isinstance(homes, dict) and {*homes.values()} == {*source.files} else None


def _is_whole(source: Checkpoint) -> bool:
    """Whether the source is all of a directory that streamq.json is about."""
    shards = {path.name for path in source.root.glob("*.safetensors")}
    return shards == {*source.files} and (source.root / RECORD).is_file()


def _text(source: Checkpoint, name: str) -> str:
    """A file of the source that has to come back as it is."""
    try:
        return (source.root / name).read_bytes().decode()
    except OSError as e:
        raise CheckpointError(f"{name}: cannot be read: {e.strerror}.") from e
    except UnicodeDecodeError:
        raise CheckpointError(f"{name}: is not in UTF-8, which JSON files are.") from None


def _warnings(source: Checkpoint, options: Options, chosen: dict[str, Choice]) -> list[str]:
    found = []
    names = [*source.tensors, *(n.removesuffix(".weight") for n in source.tensors)]
    for pattern in options.disable:
        if not any(map(matcher([pattern]), names)):
            found.append(f"--disable-layers {pattern} matches no layer")
    if all(choice.coding == "raw" for choice in chosen.values()):
        found.append("no tensor is compressed")
    return found


def reasons(plan: Plan) -> Iterator[tuple[str, int, int]]:
    """Why tensors are stored as they are, with how many there are and their bytes."""
    found: dict[str, list[int]] = {}
    for shard in plan.shards:
        for item in shard.items:
            if item.coding == "raw":
                row = found.setdefault(item.why, [0, 0])
                row[0] += 1
                row[1] += item.nbytes
    return ((why, count, size) for why, (count, size) in found.items())
