"""``hf://org/repo[@revision][/sub/folder]``, as huggingface_hub spells places on the Hub."""

from __future__ import annotations

import os
import re
from typing import NamedTuple
from urllib.parse import quote, unquote

from streamq.errors import AddressError

_SCHEME = "hf://"
#: What stands for other kinds of repositories in front of their names.
_KINDS = {"datasets", "spaces", "kernels", "buckets"}
#: A name of an organization or of a repository: what the Hub lets people choose.
_NAME = re.compile(r"(?!-|\.)(?!.*(--|\.\.))[\w\-.]{1,96}(?<!-|\.)(?<!\.git)", re.ASCII)
#: What is in no name of a branch.
_NO_BRANCH = re.compile(r"^-|[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|^@$")
#: Revisions with a slash that is not written %2F.
_REFS = re.compile(r"refs/(pr/\d+|convert/[\w\-]+)(?=/|$)")


class HubPath(NamedTuple):
    """A folder of a model repository. ``revision``: None for its default branch, ``folder``: ""
    for all of it.
    """

    repo: str
    revision: str | None = None
    folder: str = ""

    def __str__(self) -> str:
        revision = "" if self.revision is None else "@" + self.revision
        if not _REFS.fullmatch(revision[1:]):
            revision = revision[:1] + quote(revision[1:], safe="")
        return f"{_SCHEME}{self.repo}{revision}{'/' if self.folder else ''}{self.folder}"

    def path_of(self, name: str) -> str:
        """Where a file of the folder is in the repository."""
        return f"{self.folder}/{name}" if self.folder else name


def is_hub(place: str | os.PathLike[str]) -> bool:
    """Whether a source or destination is said to be on the Hub."""
    return isinstance(place, str) and place.startswith(_SCHEME)


def is_branch(name: str) -> bool:
    """Whether git takes a name for a branch (git-check-ref-format(1))."""
    parts = name.split("/")
    return not _NO_BRANCH.search(name) and not any(
        part.startswith(".") or part.endswith((".", ".lock")) or not part for part in parts
    )


def parse_hub(text: str) -> HubPath:
    """The parts of an address. Raises AddressError for one that is none.

    ``hf://models/org/repo`` is the same; a slash in a revision is written ``%2F``, but for
    ``refs/pr/N`` and ``refs/convert/NAME``.
    """
    body = text.removeprefix(_SCHEME).removeprefix("models/").rstrip("/")
    if body.partition("/")[0] in _KINDS:
        raise AddressError(f"{text}: only model repositories hold checkpoints.")
    org, _, rest = body.partition("/")
    repo = re.match(r"[^@/]*", rest)
    assert repo is not None  # it matches nothing, too
    name, rest = repo.group(), rest[repo.end() :]
    if not is_hub(text) or not _NAME.fullmatch(org) or not _NAME.fullmatch(name):
        raise AddressError(f"{text!r} is not hf://org/repo[@revision][/sub/folder].")
    revision = None
    if rest.startswith("@"):
        refs = _REFS.match(rest, 1)
        end = refs.end() if refs else len(rest.partition("/")[0])
        revision, rest = unquote(rest[1:end]), rest[end:]
        if not revision:
            raise AddressError(f"{text}: no revision behind the @.")
    folder = rest.removeprefix("/")
    if folder and not all(part not in ("", ".", "..") for part in folder.split("/")):
        raise AddressError(f"{text}: {folder!r} is no folder of a repository.")
    return HubPath(f"{org}/{name}", revision, folder)
