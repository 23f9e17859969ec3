"""One commit of a repository: its files, and their bytes by ranges.

The commit is looked up once and everything is read from it by its sha, so that a branch that moves
cannot mix revisions. Large files lie elsewhere: ``resolve`` redirects to an address that is signed
and expires, which is kept as long as it works, so that a range costs the Hub itself nothing.
Files that are stored with Xet are read in the same way, as huggingface_hub's HfFileSystem does it.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from streamq.errors import HubError, Stopped
from streamq.trust import VERSION

from .address import HubPath
from .client import Again, Stop, api, patiently, pause_before

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

#: Bytes after which a connection counts as one that worked, although it broke.
PROGRESS = 1 << 16
#: How storage says that a signed address is no longer good (S3, CloudFront and Xet say 403).
_EXPIRED = {400, 401, 403, 404, 410}

#: Told the position of some bytes of a file, and the bytes, in their order.
Take = Callable[[int, bytes], object]


class Entry(NamedTuple):
    """A file. ``path``: in the repository. ``etag``: its sha256 where it is stored outside of git,
    else the id that git has for it.
    """

    path: str
    size: int
    etag: str


class _Expired(Again):
    """A signed address that was good before is so no longer."""


class Repository:
    """The files of a folder at the commit that its revision is now; for several threads at once.

    ``files``: by their paths in the folder. ``received``: bytes of files that came from the Hub.
    Raises HubError where it cannot be looked at.
    """

    def __init__(self, address: HubPath) -> None:
        from huggingface_hub import constants

        self.address = address
        self._api = client = api()
        say, timeout = str(address), constants.HF_HUB_DOWNLOAD_TIMEOUT
        info = patiently(
            lambda: client.model_info(
                address.repo, revision=address.revision, files_metadata=True, timeout=timeout
            ),
            say,
        )
        if not re.fullmatch(r"[0-9a-f]{40,64}", info.sha or ""):
            raise HubError(f"{say}: the Hub does not name its commit.")
        self.commit = str(info.sha)
        self.pinned = address._replace(revision=self.commit)
        prefix = address.folder + "/" if address.folder else ""
        self.files = {
            found.rfilename.removeprefix(prefix): _entry(found, say)
            for found in info.siblings or ()
            if found.rfilename.startswith(prefix) and _is_path(found.rfilename)
        }
        if not self.files:
            raise HubError(
                f"{say}: the repository has no file there at commit {self.commit}; check the "
                "folder."
            )
        self.received = 0
        self._signed: dict[str, tuple[str, str | None]] = {}  # by path: address and ETag there
        self._lock = threading.Lock()

    def cached(self, name: str) -> Path | None:
        """A file in the local cache of the Hub, at this commit; None where it is not there."""
        from huggingface_hub import try_to_load_from_cache

        entry = self.files[name]
        found = try_to_load_from_cache(self.address.repo, entry.path, revision=self.commit)
        if not isinstance(found, str):
            return None
        path = Path(found).resolve()
        return path if path.stat().st_size == entry.size else None

    def read(self, name: str, start: int, end: int, take: Take, stop: Stop | None = None) -> None:
        """Give the bytes of a file from ``start`` up to ``end`` to ``take``.

        What breaks is taken up again where it broke. Raises HubError where that does not help or
        the file is not what it was, Stopped when ``stop`` says so.
        """
        entry = self.files[name]
        what = f"{self.pinned}: {name}"
        at, tries = start, 0
        while at < end:
            begun = at
            try:
                for piece in self._get(entry, at, end, what):
                    if stop is not None and stop.is_set():
                        raise Stopped
                    take(at, piece[: end - at])
                    at += len(piece)
                if at != end:
                    raise Again(f"an answer of {end - begun} bytes had {at - begun}")
            except _Expired:
                continue
            except Exception as e:
                tries = 1 if at - begun >= PROGRESS else tries + 1
                pause_before(tries, e, what, stop)
            finally:
                with self._lock:
                    self.received += at - begun

    def _get(self, entry: Entry, start: int, end: int, what: str) -> Iterator[bytes]:
        """The bytes of one answer."""
        from huggingface_hub import (
            constants,
            get_session,
            hf_hub_url,
            hf_raise_for_status,
            utils,
        )

        untyped: Any = utils  # it does not export what it imports, mypy says

        with self._lock:
            signed, etag = self._signed.get(entry.path, (None, None))
        headers = {
            "Accept-Encoding": "identity", "Range": f"bytes={start}-{end - 1}",
            **untyped.build_hf_headers(
                token=self._api.token if signed is None else False,  # for the Hub alone
                library_name="streamq", library_version=VERSION,
            ),
        }  # fmt: skip
        url = signed or hf_hub_url(
            self.address.repo, entry.path, revision=self.commit, endpoint=self._api.endpoint
        )
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", url, headers=headers, timeout=timeout) as answer:
            if signed is not None and answer.status_code in _EXPIRED:
                with self._lock:
                    if self._signed.get(entry.path, ("",))[0] == signed:
                        del self._signed[entry.path]
                raise _Expired
            if _is_elsewhere(answer) and answer.status_code in _EXPIRED:
                raise Again(f"the storage that the Hub leads to answered {answer.status_code}")
            hf_raise_for_status(answer)
            for part in [*answer.history, answer]:
                self._compare(entry, part, what)
            self._refuse_other_range(entry, answer, start, end, what)
            there = answer.headers.get("etag")
            if signed is not None and None not in (etag, there) and there != etag:
                raise HubError(f"{what}: changed where it is stored (ETag {there}, before {etag}).")
            if signed is None and _is_elsewhere(answer):
                with self._lock:
                    self._signed[entry.path] = str(answer.url), there
            yield from answer.iter_bytes()

    def _compare(self, entry: Entry, answer: Any, what: str) -> None:
        """Refuse an answer of the Hub that is about another commit or another file."""
        commit = answer.headers.get("x-repo-commit", self.commit)
        etag = answer.headers.get("x-linked-etag", entry.etag).removeprefix("W/").strip('"')
        size = answer.headers.get("x-linked-size", str(entry.size))
        for said, here, there in (
            ("commit", self.commit, commit), ("ETag", entry.etag, etag),
            ("size", str(entry.size), size),
        ):  # fmt: skip
            if here != there:
                raise HubError(
                    f"{what}: the Hub gives a file of another {said}, {there} and not {here}."
                )

    @staticmethod
    def _refuse_other_range(entry: Entry, answer: Any, start: int, end: int, what: str) -> None:
        wanted = f"bytes {start}-{end - 1}/{entry.size}"
        got = answer.headers.get("content-range")
        whole = answer.status_code == 200 and (start, end) == (0, entry.size)
        if not whole and (answer.status_code != 206 or got != wanted):
            raise HubError(
                f"{what}: asked for {wanted}, and was answered {answer.status_code} {got or ''}; "
                "an endpoint or a proxy does not know ranges."
            )


def _entry(file: RepoSibling, say: str) -> Entry:
    etag, size = (file.lfs.sha256, file.lfs.size) if file.lfs else (file.blob_id, file.size)
    if not isinstance(etag, str) or not isinstance(size, int):
        raise HubError(f"{say}: the Hub does not tell size and hash of {file.rfilename!r}.")
    return Entry(file.rfilename, size, etag)


def _is_path(path: str) -> bool:
    """Whether a file of a repository may have this name on a disk, too."""
    return path.isprintable() and all(p not in ("", ".", "..") for p in path.split("/"))


def _is_elsewhere(answer: Any) -> bool:
    """Whether an answer came from another server than the Hub, by a redirect."""
    if not answer.history:
        return False
    first, last = urlsplit(str(answer.history[0].url)), urlsplit(str(answer.url))
    return (first.scheme, first.netloc) != (last.scheme, last.netloc)
