"""The files of an output that no worker writes: all but the shards, or all of a plain copy."""

from __future__ import annotations

from functools import partial

from streamq.checkpoint import CONFIG, Checkpoint
from streamq.planning import Plan

from .jobs import JOB
from .run import Target
from .worker import Progress

INDEX = "model.safetensors.index.json"


def finish(source: Checkpoint, plan: Plan, target: Target, progress: Progress) -> None:
    """All files but the shards; all files at all of a source that is what is wanted."""
    if plan.verbatim:
        index = [path.name for path in source.root.glob("*.safetensors.index.json")]
        for name in [*source.others, *index]:
            target.copy_file(source.root / name, name)
        for name in source.files:
            if target.outlet is not None and not target.is_complete(name):
                target.outlet.make_room(source.size(name))
            if source.remote is None:
                target.copy_file(source.root / name, name, keep=True)
            else:
                _copy_remote(source, name, target)
            progress(sum(t.nbytes for t in source.tensors.values() if t.file == name), name)
        return
    for name in plan.others:
        if name != CONFIG and name not in plan.files and name not in plan.texts:
            target.copy_file(source.root / name, name)
    if len(plan.shards) > 1:
        target.write_text(INDEX, plan.index())
    for name, value in {**plan.files, CONFIG: plan.config}.items():
        target.write_json(name, value)
    for name, text in plan.texts.items():
        target.write_text(name, [text])


def _copy_remote(source: Checkpoint, name: str, target: Target) -> None:
    """Take a shard as it is, some at a time."""
    size = source.size(name)
    begin = min((t.start for t in source.tensors.values() if t.file == name), default=size)
    header = bytearray(begin)
    with source.reading(partial(list, [(name, 0, begin)])):
        source.pread(name, 0, memoryview(header))
    pieces = {f"{at}": (name, at, min(size, at + JOB)) for at in range(begin, size, JOB)}
    done = target.finished(name, size, {*pieces})
    if target.is_complete(name):
        return
    shard = target.shard(name, bytes(header), size)
    try:
        for key, span in pieces.items():
            if key not in done:
                unit = shard.unit(key)
                with source.reading(partial(list, [span])):
                    unit.copy_from(source.reader(name), span[1], span[1], span[2] - span[1])
                unit.done({})
    except BaseException:
        shard.abandon()
        raise
    target.close_shard(shard)
