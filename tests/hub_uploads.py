"""The writing half of the stand-in of the Hub: what huggingface_hub asks to upload and commit.

``Uploads(hub)`` adds its rows to the routes of a stand-in. Tokens are names: who has one may write
to the repositories of that name and of ``orgs``; ``read-NAME`` may only read.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import threading
from fnmatch import fnmatch
from typing import Any

from hub_stand_in import Blob, Exchange, HubStandIn, Repo, Route, is_lfs

_REPO = r"([^/]+/[^/]+)"


class Uploads:
    """``objects``: what is stored, by sha256, of each repository. ``part``: bytes from which a file
    goes up in parts of that size. ``put``: bytes that came in by PUT. ``hide_commits``: answers to
    commits that get lost on their way.
    """

    def __init__(self, hub: HubStandIn, part: int = 1 << 40) -> None:
        self.hub = hub
        self.part = part
        self.orgs: dict[str, list[str]] = {}
        self.objects: dict[str, dict[str, Blob]] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.pulls: dict[str, list[dict[str, Any]]] = {}
        self.put = 0
        self.uploaded: list[str] = []  # sha256 of each object that came in, in order
        self.hide_commits = 0
        self.messages: list[str] = []
        self._lock = threading.Lock()
        rows: list[tuple[str, str, Any]] = [
            ("GET", r"/api/whoami-v2", self._whoami),
            ("POST", r"/api/validate-yaml", self._validate),
            ("POST", r"/api/repos/create", self._create),
            ("POST", rf"/api/models/{_REPO}/branch/([^/]+)", self._branch),
            ("POST", rf"/api/models/{_REPO}/preupload/([^/]+)", self._preupload),
            ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", self._batch),
            ("POST", rf"/{_REPO}\.git/info/lfs/verify", self._verify),
            ("POST", rf"/{_REPO}\.git/info/lfs/complete/([0-9a-f]{{64}})", self._complete),
            ("PUT", r"/upload/([^/]+)/([^/]+)/([0-9a-f]{64})(?:/(\d+))?", self._put),
            ("POST", rf"/api/models/{_REPO}/commit/([^/]+)", self._commit),
            ("GET", rf"/api/models/{_REPO}/discussions", self._discussions),
        ]
        hub.routes[:0] = [Route(*row) for row in rows]

    def forget(self, name: str) -> None:
        """Collect the garbage: what no commit of a repository has."""
        trees = self.hub.repo(name).commits.values()
        known = {blob.sha256 for tree in trees for blob in tree.values()}
        stored = self.objects.get(name, {})
        self.objects[name] = {sha: blob for sha, blob in stored.items() if sha in known}

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """The contents of a branch."""
        repo = self.hub.repos[name]
        return {p: blob.data for p, blob in repo.commits[repo.branches[revision]].items()}

    def _may(self, x: Exchange, name: str, write: bool = True) -> Repo | None:
        """The repository, or None where an error was answered."""
        repo = self.hub.repos.get(name)
        user = x.token.removeprefix("read-")
        own = name.partition("/")[0] in (user, *self.orgs.get(user, ()))
        if repo is None or (repo.private and not own):
            x.error(404 if x.token else 401, "RepoNotFound", "Repository not found")
        elif write and (not own or x.token != user):
            x.error(403, "", "you don't have the right to write to this repository")
        else:
            return repo
        return None

    def _whoami(self, x: Exchange) -> None:
        user = x.token.removeprefix("read-")
        if not user:
            x.error(401, "", "Invalid username or password.")
            return
        token = {"displayName": f"token of {user}", "role": "write" if user == x.token else "read"}
        orgs = [{"name": name} for name in self.orgs.get(user, ())]
        x.json({"type": "user", "name": user, "orgs": orgs, "auth": {"accessToken": token}})

    def _validate(self, x: Exchange) -> None:
        content = json.loads(x.body())["content"]
        if not re.match(r"---\n.*?\n---\n", content, re.DOTALL):
            x.json({"errors": [{"message": "no metadata"}], "warnings": []}, 400)
            return
        if "\nlicense: none\n" in content:
            x.json({"errors": [{"message": '"license" must be one of'}], "warnings": []}, 400)
            return
        x.json({"errors": [], "warnings": []})

    def _create(self, x: Exchange) -> None:
        asked = json.loads(x.body())
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] not in (x.token, *self.orgs.get(x.token, ())):
            x.error(403, "", "you don't have the rights to create a model under this namespace")
            return
        if name in self.hub.repos:
            said = {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}
            x.json(said, 409)
            return
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.hub.commit(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.hub.repos[name].private, self.hub.repos[name].token = private, x.token
        x.json({"url": f"{self.hub.url}/{name}", "id": name})

    def _branch(self, x: Exchange, name: str, branch: str) -> None:
        asked = json.loads(x.body())
        if (repo := self._may(x, name)) is None:
            return
        if branch in repo.branches:
            x.json({"error": "Reference already exists"}, 409)
            return
        start = asked.get("startingPoint", "main")
        repo.branches[branch] = repo.branches.get(start, start)
        x.json({})

    def _preupload(self, x: Exchange, name: str, revision: str) -> None:
        files = json.loads(x.body())["files"]
        if (repo := self._may(x, name, x.query.get("create_pr") != "1")) is None:
            return
        if revision not in repo.branches:
            x.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        tree = repo.commits[repo.branches[revision]]
        ignored = tree[".gitignore"].data.decode().split() if ".gitignore" in tree else []
        found = []
        for f in files:
            lfs = is_lfs(f["path"], Blob(b"")) or f["size"] >= 10_000_000
            there = tree.get(f["path"])
            said = {"path": f["path"], "uploadMode": "lfs" if lfs else "regular",
                    "shouldIgnore": any(fnmatch(f["path"], of) for of in ignored)}  # fmt: skip
            found.append({**said, "oid": (there.sha256 if lfs else there.oid) if there else None})
        x.json({"files": found})

    def _batch(self, x: Exchange, name: str) -> None:
        """The LFS batch: nothing to do for what is stored, one address or one for each part."""
        asked = json.loads(x.body())
        if (repo := self._may(x, name, "ref" in asked)) is None:
            return
        stored = self.objects.setdefault(name, {})
        known = {b.sha256 for tree in repo.commits.values() for b in tree.values()} | {*stored}
        answer = []
        for said in asked["objects"]:
            oid, size = said["oid"], said["size"]
            found = {"oid": oid, "size": size}
            if oid not in known:
                base = f"{self.hub.cdn}/upload/{name}/{oid}"
                upload: dict[str, Any] = {"href": base}
                if size >= self.part:
                    count = math.ceil(size / self.part)
                    href = f"{self.hub.url}/{name}.git/info/lfs/complete/{oid}"
                    parts = {f"{i:05d}": f"{base}/{i}" for i in range(1, count + 1)}
                    upload = {"href": href, "header": {"chunk_size": str(self.part), **parts}}
                verify = {"href": f"{self.hub.url}/{name}.git/info/lfs/verify"}
                found |= {"authenticated": True, "actions": {"upload": upload, "verify": verify}}
            answer.append(found)
        x.json({"transfer": "basic", "objects": answer})

    def _put(self, x: Exchange, owner: str, repo: str, oid: str, part: str | None) -> None:
        data = x.body()
        with self._lock:
            self.put += len(data)
        if part is not None:
            with self._lock:
                self.parts.setdefault(oid, {})[int(part)] = data
            x.answer(200, b"", {"ETag": f'"{hashlib.md5(data).hexdigest()}"'})
        elif hashlib.sha256(data).hexdigest() != oid:
            x.answer(400, b"<Error><Code>BadDigest</Code></Error>")
        else:
            self._store(f"{owner}/{repo}", data)
            x.answer(200, b"")

    def _store(self, name: str, data: bytes) -> None:
        blob = Blob(data)
        with self._lock:
            self.objects.setdefault(name, {})[blob.sha256] = blob
            self.uploaded.append(blob.sha256)

    def _complete(self, x: Exchange, name: str, oid: str) -> None:
        asked = json.loads(x.body())
        parts = self.parts.get(oid, {})
        tags = [f'"{hashlib.md5(parts[p["partNumber"]]).hexdigest()}"' for p in asked["parts"]]
        data = b"".join(parts[n] for n in sorted(parts))
        if tags != [p["etag"] for p in asked["parts"]] or hashlib.sha256(data).hexdigest() != oid:
            x.error(400, "", "the parts are not the object")
            return
        self._store(name, data)
        x.json({})

    def _verify(self, x: Exchange, name: str) -> None:
        asked = json.loads(x.body())
        blob = self.objects.get(name, {}).get(asked["oid"])
        if blob is None or blob.size != asked["size"]:
            x.error(404, "", "object not found")
        else:
            x.json({})

    def _commit(self, x: Exchange, name: str, revision: str) -> None:
        """One line of JSON for each change, the message and the parent first."""
        lines = [json.loads(line) for line in x.body().splitlines()]
        create_pr = x.query.get("create_pr") == "1"
        if (repo := self._may(x, name, not create_pr)) is None:
            return
        header = lines[0]["value"]
        with self.hub.lock:
            head = repo.branches.get(revision)
            if head is None:
                x.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
                return
            if not create_pr and header.get("parentCommit", head) != head:
                x.error(412, "", "A commit has happened since. Please refresh and try again.")
                return
            tree = dict(repo.commits[head])
            for line in lines[1:]:
                value = line["value"]
                if line["key"] == "file":
                    tree[value["path"]] = Blob(base64.b64decode(value["content"]))
                elif line["key"] == "deletedFile":
                    del tree[value["path"]]
                else:
                    blob = self.objects.get(name, {}).get(value["oid"]) or next(
                        (b for t in repo.commits.values() for b in t.values()
                         if b.sha256 == value["oid"]), None)  # fmt: skip
                    if blob is None or blob.size != value["size"]:
                        x.error(400, "", f"LFS object {value['oid']} is not there")
                        return
                    tree[value["path"]] = blob
            target = revision
            if create_pr:
                pulls = self.pulls.setdefault(name, [])
                target = f"refs/pr/{len(pulls) + 1}"
                pulls.append(self._pull(name, header["summary"], len(pulls) + 1, x.token))
            sha = self.hub.commit(name, tree, target)
            self.messages.append(header["summary"])
        if self.hide_commits:
            self.hide_commits -= 1
            x.close_connection = True
            x.connection.shutdown(2)
            return
        base = f"{self.hub.url}/{name}"
        said = {"success": True, "commitOid": sha, "commitUrl": f"{base}/commit/{sha}"}
        x.json({**said, "pullRequestUrl": f"{base}/discussions/{len(self.pulls.get(name, []))}"})

    @staticmethod
    def _pull(name: str, title: str, number: int, author: str) -> dict[str, Any]:
        return {
            "num": number, "title": title, "author": {"name": author}, "status": "open",
            "isPullRequest": True, "createdAt": "2026-01-01T00:00:00.000Z",
            "repo": {"name": name, "type": "model"}, "repoOwner": {"name": author},
        }  # fmt: skip

    def _discussions(self, x: Exchange, name: str) -> None:
        if self._may(x, name, False) is not None:
            pulls = self.pulls.get(name, [])
            x.json({"discussions": pulls, "count": len(pulls), "start": 0})
