"""The destinations of a conversion: checked before the first byte, opened for the run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from streamq.checkpoint import CONFIG, is_weights
from streamq.errors import PlanError
from streamq.pace import Pace
from streamq.planning import QUANTIZATION_FILES, Plan
from streamq.tensors import size_text
from streamq.trust import RECORD, VERSION
from streamq.writer import (
    CARD,
    SHARDS,
    Destination,
    HubDestination,
    HubPlace,
    Place,
    check_branch,
    check_destination,
    folder_of,
    same_disk,
)


@dataclass(frozen=True, slots=True)
class Output:
    """A plan and the place that it is carried out to."""

    plan: Plan
    dst: Place

    @property
    def folder(self) -> Path:
        """The directory; of an output on the Hub, that of its work folder."""
        return folder_of(self.dst)

    @property
    def disk_needed(self) -> int:
        """Bytes on the disk, of an output on the Hub at most at a time."""
        if not isinstance(self.dst, HubPlace):
            return self.plan.disk_needed
        return self.plan.disk_needed - self.plan.bytes_out + self.room

    @property
    def room(self) -> int:
        """Bytes of shards that an output on the Hub has on the disk at a time."""
        assert isinstance(self.dst, HubPlace)
        largest = max((shard.size for shard in self.plan.shards), default=0)
        asked = self.dst.upload.max_disk
        if asked is not None and asked < largest:
            raise PlanError(
                f"--max-disk of {size_text(asked)} is too little: the largest shard has "
                f"{size_text(largest)}; give more, or a smaller --shard-size."
            )
        return min(self.plan.bytes_out, asked or SHARDS * largest)


def is_stale(name: str) -> bool:
    """Whether a file that is no part of an output may not stay beside it in a repository."""
    return is_weights(name) or name.startswith(QUANTIZATION_FILES)


def refuse_entangled(outputs: list[Output]) -> None:
    """Raise PlanError where one output would lie in another, or be built where another is."""
    taken: list[tuple[Path, Place]] = []
    for dst, folder in ((o.dst, o.folder) for o in outputs):
        places = [folder.resolve(), folder.with_name(folder.name + ".partial").resolve()]
        for place in places:
            for other, of in taken:
                if place == other or place in other.parents or other in place.parents:
                    raise PlanError(f"the outputs {of} and {dst} overlap; choose other places.")
        taken += [(place, dst) for place in places]


def check_outputs(outputs: list[Output], overwrite: bool) -> int:
    """Everything about the destinations that can be known before writing.

    Returns the free bytes of the first. Raises WriteError; those on one disk share it.
    """
    refuse_entangled(outputs)
    free = []
    for o in outputs:
        together = sum(p.disk_needed for p in outputs if same_disk(p.folder, o.folder))
        if isinstance(o.dst, HubPlace):
            names = {CONFIG, RECORD, CARD, *o.plan.others, *o.plan.files, *o.plan.texts}
            branch, folder = o.dst.branch, o.folder
            free.append(check_branch(branch, folder, names, is_stale, together, overwrite))
        else:
            free.append(check_destination(o.dst, together, overwrite))
    return free[0]


def destination_of(
    output: Output, overwrite: bool, sync: bool, sha256: bool, pace: Pace
) -> Destination:
    """What writes an output."""
    if not isinstance(output.dst, HubPlace):
        return Destination(output.dst, overwrite, sync, sha256, pace)
    message = f"{output.plan.scheme_names}, by streamq {VERSION}"
    return HubDestination(
        output.dst.branch, output.folder, sync, sha256, output.room, is_stale, message, pace
    )
