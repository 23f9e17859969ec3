"""A Hub on 127.0.0.1: what huggingface_hub asks the real one for, with faults on demand.

Commits are file trees that never change; branches name them. Files of safetensors, and those over
``LFS``, lie with another server, as those of the real Hub do: ``resolve`` redirects there with a
signed address that expires. Small ones are redirected within the Hub, relative.

The endpoints are rows of ``ROUTES``; another module adds its own to ``hub.routes``. A fault is a
function of a request: it answers itself and says True, or leaves the request alone.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

#: Size from which a file is stored elsewhere, in bytes.
LFS = 10_000_000
_PIECE = 1 << 16


class Blob:
    """A file: its bytes, or a path to them."""

    def __init__(self, content: bytes | Path) -> None:
        self.content = content
        self.size = content.stat().st_size if isinstance(content, Path) else len(content)
        self._sha256 = ""

    @property
    def data(self) -> bytes:
        return self.content.read_bytes() if isinstance(self.content, Path) else self.content

    @property
    def sha256(self) -> str:
        if not self._sha256:
            self._sha256 = hashlib.sha256(self.data).hexdigest()
        return self._sha256

    @property
    def oid(self) -> str:
        """What git has for it; for a large file this stands for the one of its pointer."""
        if self.size >= LFS:
            return hashlib.sha1(self.sha256.encode()).hexdigest()
        return hashlib.sha1(b"blob %d\0" % self.size + self.data).hexdigest()

    def pieces(self, start: int, end: int) -> Iterable[bytes]:
        if isinstance(self.content, bytes):
            yield from (
                self.content[at : min(at + _PIECE, end)] for at in range(start, end, _PIECE)
            )
            return
        with self.content.open("rb") as file:
            file.seek(start)
            for at in range(start, end, _PIECE):
                yield file.read(min(_PIECE, end - at))


def is_lfs(path: str, blob: Blob) -> bool:
    return path.endswith((".safetensors", ".bin")) or blob.size >= LFS


@dataclass
class Repo:
    """``commits``: file trees by sha; ``branches``: shas by name. ``token``: what reading needs."""

    name: str
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    gated: bool = False
    private: bool = False


class Logged(NamedTuple):
    """A request: ``server`` hub or cdn, ``sent`` bytes of body, ``authorized`` by what token."""

    server: str
    method: str
    path: str
    query: str
    range: str
    status: int
    sent: int
    authorized: str
    headers: dict[str, str]


class Exchange(BaseHTTPRequestHandler):
    """One request and its answer; ``self.hub`` is the stand-in."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else an answer in two pieces takes 40 ms
    hub: HubStandIn
    where = "hub"
    status = 0
    sent = 0
    #: Bytes of the body after which the connection breaks.
    cut: int | None = None
    #: Seconds of silence before it does.
    stall = 0.0

    def log_message(self, *_: Any) -> None:
        pass

    @property
    def query(self) -> dict[str, str]:
        return {k: v[-1] for k, v in parse_qs(urlsplit(self.path).query).items()}

    @property
    def token(self) -> str:
        return self.headers.get("authorization", "").removeprefix("Bearer ")

    def body(self) -> bytes:
        """What was sent, chunked or not."""
        if "chunked" not in self.headers.get("transfer-encoding", ""):
            return self.rfile.read(int(self.headers.get("content-length") or 0))
        found = bytearray()
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return bytes(found)

    def start(self, status: int, length: int, headers: dict[str, str] | None = None) -> None:
        """The head of an answer."""
        self.status = status
        self.send_response(status)
        for name, value in {"Content-Length": str(length), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()

    def write(self, data: bytes) -> bool:
        """Some of the body; False where the connection is broken now."""
        if self.cut is not None and self.sent + len(data) > self.cut:
            self.wfile.write(data[: max(0, self.cut - self.sent)])
            self.sent = max(self.sent, self.cut)
            self.wfile.flush()
            self.close_connection = True
            time.sleep(self.stall)
            self.connection.shutdown(2)
            return False
        self.wfile.write(data)
        self.sent += len(data)
        return True

    def answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.start(status, len(data), headers)
        if self.command != "HEAD":
            self.write(data)

    def json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        kind = {"Content-Type": "application/json; charset=utf-8"}
        self.answer(status, json.dumps(value).encode(), {**kind, **(headers or {})})

    def error(self, status: int, code: str, message: str, **headers: str) -> None:
        """An error as the Hub tells of it."""
        said = {"X-Error-Code": code, "X-Error-Message": message} if code else {}
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.json({"error": message}, status, {**said, **named})

    def file(self, blob: Blob, headers: dict[str, str]) -> None:
        """A file, or the range of it that was asked for."""
        start, end, status = 0, blob.size, 200
        headers = {"Accept-Ranges": "bytes", **headers}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", "")):
            start = int(asked[1])
            end = min(int(asked[2]) + 1 if asked[2] else blob.size, blob.size)
            if start >= end:
                self.start(416, 0, {**headers, "Content-Range": f"bytes */{blob.size}"})
                return
            status = 206
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{blob.size}"
        self.start(status, end - start, headers)
        if self.command != "HEAD":
            for piece in blob.pieces(start, end):
                if not self.write(piece):
                    return

    def _serve(self) -> None:
        self.sent = self.status = 0
        self.cut, self.stall = None, 0.0
        try:
            self.hub.serve(self)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            self.hub.note(self)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve


#: Answers a request; the groups of its path follow, unquoted.
Handler = Callable[..., None]


class Route(NamedTuple):
    method: str  # a pattern: GET|HEAD
    path: str  # a pattern, of the quoted path
    handler: Handler


class HubStandIn:
    """``with HubStandIn() as hub``: ``hub.url`` is what HF_ENDPOINT has to be.

    ``log``: of every request. ``faults``: asked in turn, before the routes. ``uses``: requests that
    a signed address is good for. ``page``: entries of a page of a tree.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.log: list[Logged] = []
        self.faults: list[Callable[[Exchange], bool]] = []
        self.routes = list(ROUTES)
        self.uses = 10**9
        self.page = 1000
        self.lock = threading.RLock()
        self.signed: dict[str, list[Any]] = {}  # by signature: a blob, and uses that are left
        self._servers = [self._server("hub"), self._server("cdn")]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._servers[0].server_port}"

    @property
    def cdn(self) -> str:
        return f"http://127.0.0.1:{self._servers[1].server_port}"

    def _server(self, where: str) -> ThreadingHTTPServer:
        handler = type("Served", (Exchange,), {"hub": self, "where": where})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return server

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def __enter__(self) -> HubStandIn:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def repo(self, name: str) -> Repo:
        return self.repos.setdefault(name, Repo(name))

    def commit(
        self, name: str, files: dict[str, Any], branch: str = "main", keep: bool = False
    ) -> str:
        """Move a branch to a new commit with these files (bytes, or paths of some), and with those
        it had if they are to be kept; its sha.
        """
        with self.lock:
            repo = self.repo(name)
            before = repo.commits.get(repo.branches.get(branch, ""), {}) if keep else {}
            tree = {
                **before,
                **{p: f if isinstance(f, Blob) else Blob(f) for p, f in files.items()},
            }
            text = f"{name} {branch} {len(repo.commits)}" + "".join(sorted(tree))
            sha = hashlib.sha1(text.encode()).hexdigest()
            repo.commits[sha] = tree
            repo.branches[branch] = sha
            return sha

    def commit_folder(self, name: str, folder: Path, branch: str = "main", under: str = "") -> str:
        """The files of a directory."""
        paths = [p for p in sorted(folder.rglob("*")) if p.is_file()]
        return self.commit(name, {under + str(p.relative_to(folder)): p for p in paths}, branch)

    def serve(self, exchange: Exchange) -> None:
        """Faults first, then the first route that fits."""
        if any(fault(exchange) for fault in list(self.faults)):
            return
        path = urlsplit(exchange.path).path
        for method, pattern, handler in self.routes:
            found = re.fullmatch(pattern, path)
            if found and re.fullmatch(method, exchange.command):
                handler(exchange, *(g if g is None else unquote(g) for g in found.groups()))
                return
        exchange.body()
        exchange.error(404, "", f"no route {exchange.command} {path}")

    def note(self, exchange: Exchange) -> None:
        split = urlsplit(exchange.path)
        self.log.append(
            Logged(
                exchange.where, exchange.command, unquote(split.path), split.query,
                exchange.headers.get("range", ""), exchange.status, exchange.sent,
                exchange.token, dict(exchange.headers),
            )
        )  # fmt: skip

    def sent(self, pattern: str = r".*\.safetensors") -> int:
        """Bytes of bodies of files whose path matches, wherever they came from."""
        files = [r for r in self.log if "/resolve" in r.path or r.server == "cdn"]
        return sum(r.sent for r in files if re.fullmatch(pattern, r.path))

    def sign(self, blob: Blob, path: str) -> str:
        """A new address of a blob at the other server, good for ``uses`` requests."""
        with self.lock:
            signature = f"{len(self.signed):08x}"
            self.signed[signature] = [blob, self.uses]
        return f"{self.cdn}/{blob.sha256}/{quote(path)}?Signature={signature}"


def tree_of(x: Exchange, name: str, revision: str | None) -> tuple[str, dict[str, Blob]] | None:
    """The commit of a revision and its files, or None where an error was answered."""
    repo = x.hub.repos.get(name)
    if repo is None or (repo.private and x.token != repo.token):
        x.error(401 if not x.token else 404, "RepoNotFound", "Repository not found")
        return None
    if repo.gated and x.token != repo.token:
        said = f"Access to model {name} is restricted."
        x.error(403 if x.token else 401, "GatedRepo", said)
        return None
    sha = repo.branches.get(revision or "main", revision or "")
    if sha not in repo.commits:
        x.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return None
    return sha, repo.commits[sha]


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "file", "path": path, "size": blob.size, "oid": blob.oid}
    if is_lfs(path, blob):
        found["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}
        found["xetHash"] = blob.sha256[::-1]
    return found


def _info(x: Exchange, name: str, revision: str | None = None) -> None:
    if (found := tree_of(x, name, revision)) is None:
        return
    sha, tree = found
    siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(tree)]
    if x.query.get("blobs", "").lower() == "true":
        for s in siblings:
            blob = tree[s["rfilename"]]
            s |= {"size": blob.size, "blobId": blob.oid}
            if is_lfs(s["rfilename"], blob):
                s["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": 134}
    repo = x.hub.repos[name]
    x.json({"id": name, "modelId": name, "sha": sha, "private": repo.private, "tags": [],
            "gated": "manual" if repo.gated else False, "siblings": siblings})  # fmt: skip


def _tree(x: Exchange, name: str, revision: str, folder: str | None) -> None:
    """A page of a listing, as the Hub gives it: the next one is in the header Link."""
    if (found := tree_of(x, name, revision)) is None:
        return
    prefix = folder + "/" if folder else ""
    entries: dict[str, dict[str, Any]] = {}
    for path, blob in sorted(found[1].items()):
        if not path.startswith(prefix):
            continue
        parts = path[len(prefix) :].split("/")
        for depth in range(1, len(parts)):
            at = prefix + "/".join(parts[:depth])
            entries[at] = {"type": "directory", "path": at, "size": 0, "oid": "0" * 40}
        entries[path] = _entry(path, blob)
    if x.query.get("recursive", "").lower() != "true":
        entries = {p: e for p, e in entries.items() if "/" not in p[len(prefix) :]}
    if not entries and folder:
        x.error(404, "EntryNotFound", f"{folder} does not exist on {revision!r}")
        return
    begun = int(x.query.get("cursor", 0))
    end = begun + x.hub.page
    base = x.path.partition("?")[0]
    more = f"{x.hub.url}{base}?recursive={x.query.get('recursive')}&cursor={end}"
    link = {"Link": f'<{more}>; rel="next"'} if end < len(entries) else {}
    x.json(list(entries.values())[begun:end], 200, link)


def _paths_info(x: Exchange, name: str, revision: str) -> None:
    paths = parse_qs(x.body().decode()).get("paths", [])
    if (found := tree_of(x, name, revision)) is not None:
        x.json([_entry(p, found[1][p]) for p in paths if p in found[1]])


def _resolve(x: Exchange, name: str, revision: str, path: str) -> None:
    if (found := tree_of(x, name, revision)) is None:
        return
    sha, tree = found
    blob = tree.get(path)
    if blob is None:
        x.error(404, "EntryNotFound", "Entry not found", X_Repo_Commit=sha)
        return
    headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
    if is_lfs(path, blob):
        headers |= {"X-Linked-Size": str(blob.size), "X-Linked-Etag": f'"{blob.sha256}"',
                    "X-Xet-Hash": blob.sha256[::-1]}  # fmt: skip
        x.answer(302, b"", {**headers, "Location": x.hub.sign(blob, path)})
    else:
        at = f"/api/resolve-cache/models/{name}/{sha}/{quote(path, safe='')}"
        headers |= {"ETag": f'"{blob.oid}"', "X-Linked-Etag": f'"{blob.oid}"',
                    "X-Linked-Size": str(blob.size)}  # fmt: skip
        x.answer(307, b"", {**headers, "Location": at})


def _resolve_cache(x: Exchange, name: str, sha: str, path: str) -> None:
    if (found := tree_of(x, name, sha)) is not None:
        blob = found[1][path]
        x.file(blob, {"X-Repo-Commit": sha, "ETag": f'"{blob.oid}"'})


def _stored(x: Exchange, sha256: str, path: str) -> None:
    """The other server: 403 for an address that has expired, as storage says it."""
    with x.hub.lock:
        entry = x.hub.signed.get(x.query.get("Signature", ""))
        if entry is not None:
            entry[1] -= 1
    if x.where != "cdn" or entry is None or entry[1] < 0 or entry[0].sha256 != sha256:
        x.answer(403, b"<Error><Message>Request has expired</Message></Error>",
                 {"Content-Type": "application/xml"})  # fmt: skip
        return
    x.file(entry[0], {"ETag": f'"{sha256[:32]}-7"'})  # as storage makes them: not the Hub's


_REPO = r"([^/]+/[^/]+)"
ROUTES = [
    Route("GET", rf"/api/models/{_REPO}", _info),
    Route("GET", rf"/api/models/{_REPO}/revision/([^/]+)", _info),
    Route("GET", rf"/api/models/{_REPO}/tree/([^/]+)(?:/(.+))?", _tree),
    Route("POST", rf"/api/models/{_REPO}/paths-info/([^/]+)", _paths_info),
    Route("GET|HEAD", rf"/{_REPO}/resolve/([^/]+)/(.+)", _resolve),
    Route("GET|HEAD", rf"/api/resolve-cache/models/{_REPO}/([^/]+)/(.+)", _resolve_cache),
    Route("GET|HEAD", r"/([0-9a-f]{64})/(.+)", _stored),
]


# Faults: each returns a function for ``hub.faults``. ``where`` is a pattern of paths with the
# server before them, such as "cdn/.*"; ``times`` how often it happens at most.


def _now_and_then(rate: float, seed: int, where: str, times: int) -> Callable[[Exchange], bool]:
    chance, left, lock = random.Random(seed), [times], threading.Lock()

    def hit(x: Exchange) -> bool:
        if not re.fullmatch(where, x.where + unquote(urlsplit(x.path).path)):
            return False
        with lock:
            if left[0] <= 0 or chance.random() >= rate:
                return False
            left[0] -= 1
            return True

    return hit


def failing(
    rate: float = 1.0, status: int = 503, seed: int = 0, where: str = ".*", times: int = 10**9,
    **headers: str,
) -> Callable[[Exchange], bool]:  # fmt: skip
    """Some requests get an error; ``Retry_After="1"`` is a header of it."""
    hit = _now_and_then(rate, seed, where, times)

    def fault(x: Exchange) -> bool:
        if not hit(x):
            return False
        x.body()
        x.error(status, "", "the stand-in was told to fail", **headers)
        return True

    return fault


def cutting(
    rate: float = 1.0, after: int = 1000, seed: int = 0, where: str = "cdn/.*",
    times: int = 10**9, stall: float = 0.0,
) -> Callable[[Exchange], bool]:  # fmt: skip
    """Some connections break in the middle of the body, or say nothing for a while before."""
    hit = _now_and_then(rate, seed, where, times)

    def fault(x: Exchange) -> bool:
        if hit(x):
            x.cut, x.stall = after, stall
        return False

    return fault


def stalling(
    seconds: float, rate: float = 1.0, seed: int = 0, where: str = "cdn/.*", times: int = 10**9
) -> Callable[[Exchange], bool]:
    """Some requests wait before they are answered."""
    hit = _now_and_then(rate, seed, where, times)

    def fault(x: Exchange) -> bool:
        if hit(x):
            time.sleep(seconds)
        return False

    return fault
