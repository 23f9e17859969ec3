"""A branch to write to: what is there, files that go up one by one, one commit at the end."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from streamq.errors import HubError

from .address import HubPath
from .client import Stop, api, endpoint, patiently, pause_before
from .files import TIMEOUT, Sum, ids_of, refuse_ignored, sending, uploaded

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, ModelInfo

MAIN = "main"
#: Tries of an upload that storage refused, as it does signed addresses that have expired; each
#: asks for another address.
TRIES = 5
#: Most objects of one question; huggingface_hub asks for as many at a time.
_BATCH = 256


class Found(NamedTuple):
    """A branch as it was looked at. ``head``: its commit. ``files``: by path, the sha256 of a
    stored file and the id of git of any other.
    """

    head: str
    private: bool
    files: dict[str, str]


class Committed(NamedTuple):
    """Where a commit or a pull request is: for people, and as a revision."""

    url: str
    revision: str


class Branch:
    """A branch of a model repository that gets the files of one output. Raises HubError."""

    def __init__(
        self, path: HubPath, branch: str = MAIN, private: bool = False, create_pr: bool = False
    ) -> None:
        self.path, self.branch = path, branch
        self.private, self.create_pr = private, create_pr
        self._api = api()
        self._found: Found | None = None
        self._fresh = False  # whether the branch has to be made, of the head that was found
        self._checked = False

    def __str__(self) -> str:
        return str(self.path if self.branch == MAIN else self.path._replace(revision=self.branch))

    def look(self, branch: str) -> Found | None:
        """What is in a branch or a pull request; None where there is none."""
        from huggingface_hub.errors import (
            GatedRepoError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        def ask() -> ModelInfo | None:
            try:
                return self._api.model_info(
                    self.path.repo, revision=branch, files_metadata=True, timeout=TIMEOUT
                )
            except GatedRepoError:
                raise
            except (RepositoryNotFoundError, RevisionNotFoundError):
                return None

        info = patiently(ask, str(self))
        if info is None:
            return None
        files = {
            s.rfilename: (s.lfs.sha256 if s.lfs else s.blob_id) or ""
            for s in info.siblings or ()
        }  # fmt: skip
        return Found(info.sha or "", bool(info.private), files)

    def check(
        self, names: Collection[str], is_stale: Callable[[str], bool], overwrite: bool,
        made: Path,
    ) -> None:  # fmt: skip
        """Everything that can be known before the first byte; asks the Hub once.

        ``names``: of the files to come. ``is_stale``: of which others would have to go.
        ``made``: a file that only this output has, where an earlier run got that far. Raises
        HubError where they are in the way without ``overwrite``.
        """
        if self._checked:
            return
        self._find(self._check_login())
        found = self._found
        if found is not None:
            if self.private and not found.private:
                raise HubError(
                    f"{self}: is public; make it private in its settings, or leave out --private."
                )
            ours = made.exists() and found.files.get(made.name) in ids_of(made)
            there = [f for f in found.files if f in names or is_stale(f)]
            if there and not (self._fresh or overwrite or ours):
                more = f" and {len(there) - 3} more" if len(there) > 3 else ""
                raise HubError(
                    f"{self}: has {', '.join(sorted(there)[:3])}{more} already; choose another "
                    "repository or --branch, or --overwrite to replace them in one commit."
                )
            if not self.create_pr:  # asks for the right to write
                self.present([Sum(hashlib.sha256(b"streamq").hexdigest(), 7)])
        self._checked = True

    def _check_login(self) -> set[str]:
        """The names that repositories can be made for.

        Raises HubError without a token, and for one that may not write.
        """
        user = patiently(self._api.whoami, str(self))
        token = user.get("auth", {}).get("accessToken", {})
        if token.get("role") == "read":
            raise HubError(
                f"{self}: the token {token.get('displayName')!r} may only read; log in with one "
                "that may write (`hf auth login`, or HF_TOKEN)."
            )
        return {str(of.get("name")) for of in (user, *user.get("orgs", ()))}

    def _find(self, names: set[str]) -> None:
        """Look at the branch, or at what it will be made of; ``names``: see ``_check_login``."""
        found, main = self.look(self.branch), None
        if self.branch != MAIN:
            main = self.look(MAIN)
            # One that is no more than main has nothing of its own to lose.
            self._fresh = main is not None and (found is None or found.head == main.head)
        if found is None and self.branch.startswith("refs/"):
            raise HubError(f"{self}: is not there, and such a one cannot be made; check --branch.")
        self._found = found or main
        if self.create_pr and found is None:
            raise HubError(
                f"{self}: is not there, or this login may not see it; a pull request needs a "
                "repository and a branch that are."
            )
        owner = self.path.repo.partition("/")[0]
        if self._found is None and owner not in names:
            raise HubError(
                f"{self}: no such repository, and this login cannot make one for {owner!r}; "
                "check the name, or log in as somebody of it."
            )

    def make(self) -> None:
        """Make the repository if it is not there."""
        if self._found is None:
            patiently(
                lambda: self._api.create_repo(
                    self.path.repo, private=self.private or None, exist_ok=True
                ),
                str(self),
            )
            self._found, self._fresh = self.look(MAIN), self.branch != MAIN
            if self._found is None:
                raise HubError(f"{self}: was made, but the Hub does not show it; run again.")
            if self._found.files.keys() - {".gitattributes"}:
                raise HubError(
                    f"{self}: somebody else made it meanwhile; look at it, then run again."
                )

    def present(self, sums: Collection[Sum]) -> set[str]:
        """Of which files, by their sha256, the Hub has stored the bytes for this repository."""
        from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info

        infos = [UploadInfo(size=s.size, sample=b"", sha256=bytes.fromhex(s.sha256)) for s in sums]
        found: set[str] = set()
        for at in range(0, len(infos), _BATCH):

            def ask(part: list[UploadInfo] = infos[at : at + _BATCH]) -> list[dict[str, Any]]:
                return post_lfs_batch_info(
                    part, None, "model", self.path.repo, self._stored_for, endpoint()
                )[0]

            found.update(o["oid"] for o in patiently(ask, str(self)) if not o.get("actions"))
        return found

    @property
    def _stored_for(self) -> str | None:
        """The branch whose rights count: none for a pull request, which readers may open."""
        return None if self.create_pr else MAIN if self._fresh else self.branch

    def upload(self, path: Path, name: str, known: Sum, stop: Stop) -> bool:
        """Store a file, not yet committed; False for one that goes into the commit itself."""
        from huggingface_hub import CommitOperationAdd

        def send() -> CommitOperationAdd:
            op = CommitOperationAdd(name, str(path))
            op.upload_info.sha256 = bytes.fromhex(known.sha256)
            self._api.preupload_lfs_files(
                self.path.repo, [op], revision=MAIN if self._fresh else self.branch,
                create_pr=self.create_pr, free_memory=False,
            )  # fmt: skip
            return op

        tries = 0
        while True:
            try:
                op = patiently(lambda: sending(send), f"{self}: {name}", stop)
                refuse_ignored([op], self)
                return op._is_uploaded
            except HubError as e:
                tries += 1
                response = getattr(e.__cause__, "response", None)
                refused = response is not None and response.request.method == "PUT"
                if not refused or e.transient or tries == TRIES:
                    raise

    def commit(
        self, files: Mapping[str, Path], stored: Mapping[str, Sum],
        is_stale: Callable[[str], bool], message: str,
    ) -> Committed:  # fmt: skip
        """One commit with all files, without those that are stale.

        ``files``: on disk, ``stored``: uploaded before, by name. Raises HubError where the branch
        has moved since it was looked at.
        """
        assert self._found is not None
        head = self._found.head
        if self._fresh:
            self._make_branch(head)
        wanted = {name: {s.sha256} for name, s in stored.items()}
        wanted |= {name: ids_of(path) for name, path in files.items()}

        def is_whole(found: Found) -> bool:
            there = {f for f in found.files if f in wanted or is_stale(f)}
            return there == {*wanted} and all(found.files[f] in wanted[f] for f in wanted)

        stale = [f for f in self._found.files if f not in wanted and is_stale(f)]
        tries = 0
        done = self._done(self._found, is_whole, message)
        while done is None:
            try:
                return sending(lambda: self._send(files, stored, stale, head, message))
            except Exception as e:  # also where the answer alone was lost
                now = self.look(self.branch)
                done = self._done(now, is_whole, message)
                moved = not self.create_pr and (now is None or now.head != head)
                if done is None and moved:
                    raise HubError(
                        f"{self}: moved on from {head[:8]} while this was converted; look at what "
                        "changed there and run the same command again, nothing is converted or "
                        "uploaded twice."
                    ) from e
                tries += 1
                if done is None:
                    pause_before(tries, e, str(self))
        return done

    def _done(
        self, found: Found | None, is_whole: Callable[[Found], bool], message: str
    ) -> Committed | None:
        """A commit or a pull request that has all of it already."""
        home = f"{self._api.endpoint}/{self.path.repo}"
        if not self.create_pr:
            if found is None or not is_whole(found):
                return None
            return Committed(f"{home}/commit/{found.head}", found.head)

        def ask() -> list[int]:
            said = self._api.get_repo_discussions(
                self.path.repo, discussion_type="pull_request", discussion_status="open"
            )
            return [d.num for d in said if d.title == message]

        for number in patiently(ask, str(self)):
            pull = self.look(f"refs/pr/{number}")
            if pull is not None and is_whole(pull):
                return Committed(f"{home}/discussions/{number}", f"refs/pr/{number}")
        return None

    def _send(
        self, files: Mapping[str, Path], stored: Mapping[str, Sum], stale: list[str], head: str,
        message: str,
    ) -> Committed:  # fmt: skip
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        adds = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        self._api.preupload_lfs_files(  # the commit would do it; it tells what is left out
            self.path.repo, adds, revision=self.branch, create_pr=self.create_pr, free_memory=False
        )
        refuse_ignored(adds, self)
        info = self._api.create_commit(
            self.path.repo,
            [
                *(CommitOperationDelete(name) for name in stale),
                *adds,
                *(uploaded(name, s) for name, s in stored.items()),
            ],
            commit_message=message, revision=self.branch, create_pr=self.create_pr,
            parent_commit=head,
        )  # fmt: skip
        return Committed(info.pr_url or info.commit_url, info.pr_revision or info.oid)

    def _make_branch(self, head: str) -> None:
        patiently(
            lambda: self._api.create_branch(
                self.path.repo, branch=self.branch, revision=head, exist_ok=True
            ),
            str(self),
        )
