"""The storage that Xet uploads go to: xorbs of chunks, and shards that say which files they make.

The formats are those of the public specification (huggingface.co/docs/xet): a shard is records of
48 bytes, a chunk of a xorb has a header of 8. Only what an upload of new files needs.
"""

from __future__ import annotations

import hashlib
import struct

from hub_stand_in import Exchange, Route
from hub_uploads import Uploads

_RECORD = 48
_VERIFIED, _DESCRIBED = 1 << 31, 1 << 30
_LZ4, _GROUPED = 1, 2


class Xet:
    """Adds its rows to the routes of a stand-in; files come to ``uploads`` as others do.

    ``received``: bytes of xorbs.
    """

    def __init__(self, uploads: Uploads) -> None:
        self.uploads = uploads
        self.xorbs: dict[str, list[bytes]] = {}
        self.received = 0
        uploads.hub.routes[:0] = [
            Route("GET", r"/api/models/([^/]+/[^/]+)/xet-write-token/([^/]+)", self._token),
            Route("GET", r"/v1/chunks/.*", self._unknown),
            Route("POST", r"/v1/xorb-grants/.*", self._unknown),
            Route("POST", r"/v1/xorbs/default/([0-9a-f]{64})", self._xorb),
            Route("POST", r"/v2/shards", self._unknown),
            Route("POST", r"/v1/shards", self._shard),
        ]

    def _token(self, x: Exchange, name: str, revision: str) -> None:
        if self.uploads._may(x, name, x.query.get("create_pr") != "1") is not None:
            token = f"xet of {name}"
            x.json({"accessToken": token, "exp": 2_000_000_000, "casUrl": self.uploads.hub.cdn})

    def _unknown(self, x: Exchange, *_: str) -> None:
        x.body()
        x.error(404, "", "not found")

    def _xorb(self, x: Exchange, name: str) -> None:
        data = x.body()
        self.received += len(data)
        self.xorbs[name] = list(_chunks(data))
        x.json({"was_inserted": True})

    def _shard(self, x: Exchange) -> None:
        """The files of a shard: of each the chunks that make it up, and its sha256."""
        records = memoryview(x.body())
        at = _RECORD  # behind the header
        while bytes(records[at : at + 32]) != b"\xff" * 32:
            flags, count = struct.unpack_from("<II", records, at + 32)
            at += _RECORD
            data = bytearray()
            for _ in range(count):
                xorb = _hex(records[at : at + 32])
                size, first, last = struct.unpack_from("<III", records, at + 36)
                part = b"".join(self.xorbs[xorb][first:last])
                assert len(part) == size
                data += part
                at += _RECORD
            at += count * _RECORD * bool(flags & _VERIFIED)
            assert flags & _DESCRIBED, "a file without its sha256"
            assert _hex(records[at : at + 32]) == hashlib.sha256(data).hexdigest()
            at += _RECORD
            self.uploads._store(x.token.removeprefix("xet of "), bytes(data))
        x.json({"result": 1})


def _hex(raw: memoryview) -> str:
    """A hash: four numbers of 64 bits."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


def _chunks(data: bytes):  # type: ignore[no-untyped-def]
    """What the chunks of a xorb hold, up to its footer, if it has one."""
    at = 0
    while at < len(data) and data[at : at + 7] != b"XETBLOB":
        packed = int.from_bytes(data[at + 1 : at + 4], "little")
        how, size = data[at + 4], int.from_bytes(data[at + 5 : at + 8], "little")
        chunk = data[at + 8 : at + 8 + packed]
        at += 8 + packed
        if how:
            chunk = _unpacked(chunk)
        if how == _GROUPED:
            chunk = _ungrouped(chunk)
        assert len(chunk) == size
        yield chunk


def _ungrouped(data: bytes) -> bytes:
    """The bytes 0, 4, 8 ... lie together, then 1, 5, 9 ... and so on."""
    found, at = bytearray(len(data)), 0
    for i in range(4):
        count = len(range(i, len(data), 4))
        found[i::4] = data[at : at + count]
        at += count
    return bytes(found)


def _unpacked(data: bytes) -> bytes:
    """A frame of LZ4."""
    flags = data[4]
    at = 7 + 8 * bool(flags & 8)
    out = bytearray()
    while size := int.from_bytes(data[at : at + 4], "little"):
        at += 4
        block = data[at : at + (size & 0x7FFFFFFF)]
        if size >> 31:
            out += block
        else:
            _unpack_block(block, out)
        at += len(block) + 4 * bool(flags & 16)
    return bytes(out)


def _unpack_block(data: bytes, out: bytearray) -> None:
    """Literals, and matches with what is out already."""
    at = 0

    def length(nibble: int) -> int:
        nonlocal at
        if nibble == 15:
            more = 255
            while more == 255:
                more = data[at]
                nibble += more
                at += 1
        return nibble

    while at < len(data):
        token = data[at]
        at += 1
        count = length(token >> 4)
        out += data[at : at + count]
        at += count
        if at < len(data):
            back = int.from_bytes(data[at : at + 2], "little")
            at += 2
            for _ in range(length(token & 15) + 4):
                out.append(out[-back])
