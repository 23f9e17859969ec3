"""Where an output goes: a directory, or a branch on the Hub with a folder for what goes there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from streamq.errors import AddressError
from streamq.hub import MAIN, Branch, is_branch, is_hub, parse_hub
from streamq.hub.card import is_model


@dataclass(frozen=True, slots=True)
class Upload:
    """How outputs come to the Hub.

    ``private``: the repository, where it has to be made. ``branch``: made of main where it is not
    there. ``create_pr``: a pull request in place of a commit. ``work_dir``: for what is on its way.
    ``max_disk``: bytes of shards that may be there at a time. ``base_model``: for the model card,
    where the source does not say it. ``command``: for the card, how it was made.
    """

    private: bool = False
    branch: str | None = None
    create_pr: bool = False
    work_dir: Path | None = None
    max_disk: int | None = None
    base_model: str | None = None
    command: str | None = None


@dataclass(frozen=True, slots=True)
class HubPlace:
    """A branch, and the ``folder`` beside which its work folder is; ``upload``: see there."""

    branch: Branch
    folder: Path
    upload: Upload

    def __str__(self) -> str:
        return str(self.branch)


Place = Path | HubPlace


def place_of(dst: str | os.PathLike[str], upload: Upload = Upload()) -> Place:
    """What a destination is by its spelling. Raises AddressError.

    The work folder has the name of the repository and the branch, so that the same command
    finds it again.
    """
    if not is_hub(dst):
        return Path(dst)
    path = parse_hub(str(dst))
    if path.folder:
        raise AddressError(f"{dst}: an output is a whole repository; leave out {path.folder!r}.")
    if path.revision is not None:
        raise AddressError(f"{dst}: give the branch with --branch {path.revision}.")
    branch = upload.branch or MAIN
    if not is_branch(branch):
        raise AddressError(f"--branch {branch!r}: git knows no branch of such a name.")
    if upload.base_model is not None and not is_model(upload.base_model):
        raise AddressError(f"--base-model {upload.base_model!r}: is not org/repo.")
    name = f"{path.repo}/{branch}".replace("/", "--")
    return HubPlace(
        Branch(path, branch, upload.private, upload.create_pr),
        (upload.work_dir or default_work_dir()) / quote(name, safe=""),
        upload,
    )


def folder_of(place: Place) -> Path:
    """Where an output is on the disk: the directory, or beside which the work folder is."""
    return place.folder if isinstance(place, HubPlace) else place


def refuse_unused(upload: Upload, places: list[Place]) -> None:
    """Raise AddressError for options of the Hub where no output goes there."""
    said = {
        "--private": upload.private, "--branch": upload.branch, "--create-pr": upload.create_pr,
        "--work-dir": upload.work_dir, "--max-disk": upload.max_disk,
        "--base-model": upload.base_model,
    }  # fmt: skip
    given = [option for option, value in said.items() if value]
    if given and not any(isinstance(place, HubPlace) for place in places):
        raise AddressError(f"{given[0]} is for destinations on the Hub, hf://org/repo.")


def default_work_dir() -> Path:
    """Beside the cache of the Hub, which people put where there is room (``HF_HOME``)."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("HF_HOME") or Path(home) / "huggingface") / "streamq" / "uploads"
