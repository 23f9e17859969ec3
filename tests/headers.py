"""Files of safetensors headers: malformed ones with the sentence they earn, odd legal ones."""

import json

from streamq.checkpoint.header import MAX_HEADER


def pack(header, data=b""):
    """A file of this header (a value, or JSON as text or bytes) and these data."""
    if not isinstance(header, str | bytes):
        header = json.dumps(header)
    raw = header.encode() if isinstance(header, str) else header
    return len(raw).to_bytes(8, "little") + raw + data


def entry(dtype='"F32"', shape="[1]", offsets="[0,4]"):
    return f'{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}'


def one(name="w", size=4, **kw):
    """A file of one tensor of ``size`` bytes; the keywords are JSON text."""
    return pack(f'{{"{name}":{entry(**kw)}}}', bytes(size))


def two(first, second, size):
    """A file of two U8 tensors, a and b, at these offsets."""
    spans = {"a": first, "b": second}
    return pack(
        {
            n: {"dtype": "U8", "shape": [e - s], "data_offsets": [s, e]}
            for n, (s, e) in spans.items()
        },
        bytes(size),
    )


def meta(text):
    return pack(f'{{"__metadata__":{text}}}')


def nested(depth, leaf=""):
    return "[" * depth + leaf + "]" * depth


NOT_JSON = "its header is not valid JSON"
NOT_OBJECT = "its header is not a JSON object"
KEYS = "must have exactly dtype, shape and data_offsets"
SHAPE = "has the invalid shape"
OVERFLOW = "the shape .* of tensor 'w' overflows"
OFFSETS = "has invalid data_offsets"
METADATA = "__metadata__ must map strings to strings"
E = entry()

# id, file, sentence (a regular expression), tensor that the message names
MALFORMED = [
    ("empty file", b"", "0 bytes are too few", None),
    ("7 bytes", bytes(7), "7 bytes are too few", None),
    (
        "header over the limit",
        (MAX_HEADER + 1).to_bytes(8, "little") + b"{}",
        "claims 100000001 bytes, the format allows 100000000",
        None,
    ),
    ("length of 2**64-1", b"\xff" * 8 + b"{}", f"claims {2**64 - 1} bytes", None),
    (
        "header longer than file",
        (3).to_bytes(8, "little") + b"{}",
        "its header needs 11 bytes, the file has 10; it is truncated",
        None,
    ),
    (
        "header at the limit, file short",
        MAX_HEADER.to_bytes(8, "little") + b"{}",
        "its header needs 100000008 bytes, the file has 10; it is truncated",
        None,
    ),
    # The header itself
    ("no header", pack(""), NOT_OBJECT, None),
    ("leading space", pack(" {}"), NOT_OBJECT, None),
    ("byte order mark", pack("\ufeff{}"), NOT_OBJECT, None),
    ("an array", pack("[]"), NOT_OBJECT, None),
    ("array form", pack(f"[null,{{{E}}}]"), NOT_OBJECT, None),
    ("a number", pack("1"), NOT_OBJECT, None),
    ("null", pack("null"), NOT_OBJECT, None),
    ("HTML", pack("<html>\n<body>"), NOT_OBJECT, None),
    ("open brace", pack("{"), NOT_JSON, None),
    ("trailing comma", pack(f'{{"w":{E},}}', bytes(4)), NOT_JSON, None),
    ("second value", pack("{}{}"), NOT_JSON, None),
    ("padding of zero bytes", pack("{}\0\0"), NOT_JSON, None),
    ("single quotes", pack("{'w':1}"), NOT_JSON, None),
    ("raw newline in a name", one(name="a\nb"), NOT_JSON, None),
    ("unknown escape", one(name="\\x41"), NOT_JSON, None),
    ("not UTF-8", pack(b'{"\xff":1}'), NOT_JSON, None),
    ("overlong UTF-8", pack(b'{"\xc0\x80":1}'), NOT_JSON, None),
    ("UTF-8 of a surrogate", pack(b'{"\xed\xa0\x80":1}'), NOT_JSON, None),
    ("UTF-16", pack('{"w":1}'.encode("utf-16-le")), NOT_JSON, None),
    ("5000 digits", one(shape=f"[{'1' * 5000}]"), NOT_JSON, None),
    # Duplicates
    ("duplicate name", pack(f'{{"w":{E},"w":{E}}}', bytes(4)), "its header has 'w' twice", None),
    (
        "duplicate name, other data",
        pack(f'{{"w":{E},"w":{entry(offsets="[4,8]")}}}', bytes(8)),
        "its header has 'w' twice",
        None,
    ),
    (
        "duplicate name by escape",
        pack(f'{{"w":{E},"\\u0077":{E}}}', bytes(4)),
        "its header has 'w' twice",
        None,
    ),
    ("duplicate name, no entry", pack(f'{{"w":1,"w":{E}}}', bytes(4)), "has 'w' twice", None),
    *(
        (
            f"duplicate {key}",
            pack(f'{{"w":{{{text},{E[1:]}}}', bytes(4)),
            f"its header has '{key}' twice",
            None,
        )
        for key, text in (
            ("dtype", '"dtype":"F32"'),
            ("shape", '"shape":[1]'),
            ("data_offsets", '"data_offsets":[0,4]'),
        )
    ),
    (
        "duplicate __metadata__",
        pack('{"__metadata__":{},"__metadata__":{}}'),
        "its header has '__metadata__' twice",
        None,
    ),
    # Four strings, as many as a __metadata__ of null has fewer than a tensor's entry.
    (
        "duplicate name beside null metadata",
        pack('{"__metadata__":null,"w":{"dtype":"F32","shape":[1]},"w":' + E + "}", bytes(4)),
        "its header has 'w' twice",
        None,
    ),
    (
        "duplicate shapes beside null metadata",
        pack('{"__metadata__":null,"w":{' + '"shape":[2],' * 4 + E[1:] + "}", bytes(4)),
        "its header has 'shape' twice",
        None,
    ),
    ("duplicate key in __metadata__", meta('{"k":"1","k":"2"}'), "its header has 'k' twice", None),
    # Entries
    ("unknown key", pack(f'{{"w":{{"x":1,{E[1:]}}}', bytes(4)), KEYS, "w"),
    *(
        (
            f"no {key}",
            pack({"w": {k: v for k, v in json.loads(E).items() if k != key}}, bytes(4)),
            KEYS,
            "w",
        )
        for key in ("dtype", "shape", "data_offsets")
    ),
    *(
        (f"entry is {text}", pack(f'{{"w":{text}}}'), KEYS, "w")
        for text in ("null", "1", '"F32"', "[]", "{}", '["F32",[1],[0,4]]')
    ),
    ("entry of keys as an array", pack('{"w":["dtype","shape","data_offsets"]}'), KEYS, "w"),
    ("unknown dtype", one(dtype='"F31"'), "has the unknown dtype 'F31'", "w"),
    ("dtype in lower case", one(dtype='"f32"'), "has the unknown dtype 'f32'", "w"),
    *(
        (f"dtype is {text}", one(dtype=text), "has the unknown dtype", "w")
        for text in ("null", "32", '["F32"]', '{"F32":null}', '""')
    ),
    # Shapes
    *(
        (f"shape {text}", one(shape=text), SHAPE, "w")
        for text in (
            *("null", "1", '"1"', "{}", '{"0":1}', "[-1]", "[-1,-1]", "[1.0]", "[1e0]", "[true]"),
            *("[false]", "[null]", '["1"]', "[[1]]", "[-0.0]", "[1e999]", f"[{2**64}]", "[1,-1]"),
        )
    ),
    (
        "shape [-0]",
        one(shape="[-0]", offsets="[0,0]", size=0),
        "its header has the number -0",
        None,
    ),
    ("shape [1, -0]", one(shape="[1, \n-0 ]", offsets="[0,0]", size=0), "number -0", None),
    ("offsets [-0, 4]", one(offsets="[-0,4]"), "its header has the number -0", None),
    (
        "shape overflows",
        one(shape=f"[{2**32},{2**32}]"),
        OVERFLOW,
        "w",
    ),
    (
        "shape overflows before its 0",
        one(shape=f"[{2**63},2,0]", offsets="[0,0]", size=0),
        OVERFLOW,
        "w",
    ),
    ("bits overflow", one(shape=f"[{2**60}]"), OVERFLOW, "w"),
    # Offsets
    *(
        (f"offsets {text}", one(offsets=text), OFFSETS, "w")
        for text in (
            *("null", "4", '"0,4"', '{"0":0,"1":4}', "[]", "[4]", "[0,4,4]", "[0,4.0]", "[0,true]"),
            *("[-4,0]", "[0,null]", f"[0,{2**64}]"),
        )
    ),
    ("reversed offsets", one(offsets="[4,0]"), "needs 4 bytes, its data_offsets give -4", "w"),
    (
        "offsets too short",
        one(offsets="[0,3]", size=3),
        "needs 4 bytes, its data_offsets give 3",
        "w",
    ),
    (
        "offsets too long",
        one(offsets="[0,5]", size=5),
        "needs 4 bytes, its data_offsets give 5",
        "w",
    ),
    (
        "empty offsets",
        one(offsets="[0,0]", size=0),
        r"'w' of shape \[1\] and dtype F32 needs 4 bytes, its data_offsets give 0",
        "w",
    ),
    (
        "half a byte",
        one(dtype='"F4"', shape="[3]", offsets="[0,1]", size=1),
        r"needs 1\.5 bytes",
        "w",
    ),
    (
        "half a byte, rounded up",
        one(dtype='"F4"', offsets="[0,1]", size=1),
        r"needs 0\.5 bytes",
        "w",
    ),
    (
        "six bits",
        one(dtype='"F6_E2M3"', shape="[2]", offsets="[0,2]", size=2),
        "needs 1.5 bytes",
        "w",
    ),
    # Layout
    ("gap at the start", two((1, 2), (2, 4), 4), "leaves a gap before it", "a"),
    ("gap", two((0, 2), (3, 4), 4), "leaves a gap before it", "b"),
    ("gap, listed backwards", two((3, 4), (0, 2), 4), "leaves a gap before it", "a"),
    ("overlap", two((0, 3), (2, 4), 4), "overlaps the tensor before it", "b"),
    ("same bytes", two((0, 4), (0, 4), 4), "overlaps the tensor before it", "b"),
    ("empty tensor inside another", two((0, 4), (2, 2), 4), "overlaps the tensor before it", "b"),
    ("empty tensor behind a gap", two((0, 4), (5, 5), 5), "leaves a gap before it", "b"),
    ("offsets near 2**64", two((0, 4), (2**64 - 5, 2**64 - 1), 4), "leaves a gap before it", "b"),
    ("bytes behind the end", one(size=5), "the file has .*; bytes at its end belong to no", None),
    ("bytes behind no tensor", pack("{}", b"x"), "end at byte 10, the file has 11 bytes", None),
    ("truncated data", one(size=3), "the file has .*; it is truncated, download it again", None),
    ("no data", one(size=0), "the file has .*; it is truncated, download it again", None),
    # Numbers that Python reads and JSON does not have
    *(
        (f"shape [{t}]", one(shape=f"[{t}]"), f"its header has {t}", None)
        for t in ("NaN", "Infinity")
    ),
    ("-Infinity", meta('{"k":-Infinity}'), "its header has -Infinity, which is not JSON", None),
    ("leading zero", one(shape="[01]"), NOT_JSON, None),
    ("plus sign", one(shape="[+1]"), NOT_JSON, None),
    ("hexadecimal", one(shape="[0x1]"), NOT_JSON, None),
    # Metadata
    *(
        (f"metadata {text}", meta(text), METADATA, None)
        for text in (
            *("1", "true", '"text"', '["k"]', '{"k":1}', '{"k":null}', '{"k":{"k":"v"}}'),
            *('{"k":["v"]}', "0", "false", '""', "[]"),
        )
    ),
    # Text that no file name, log or UTF-8 writer can carry
    ("lone surrogate in a name", one(name="\\ud800"), "is not valid Unicode", "\ud800"),
    ("surrogates in wrong order", one(name="\\ude00\\ud83d"), "is not valid", "\ude00\ud83d"),
    ("lone surrogate in a key of metadata", meta('{"\\udfff":"v"}'), METADATA, None),
    ("lone surrogate in metadata", meta('{"k":"\\ud800"}'), METADATA, None),
    # A message stays one line whatever the names hold
    (
        "line breaks in a name",
        one(name="a\\n\\u2028\\u0085b", dtype="1"),
        "dtype",
        "a\n\u2028\x85b",
    ),
    ("line breaks in a dtype", one(dtype='"a\\nb\\u2029"'), "has the unknown dtype", "w"),
    ("line breaks in a double", pack('{"a\\nb":1,"a\\nb":1}'), r"has 'a\\nb' twice", None),
    ("line breaks between tokens", pack('{\n"w"\n:\r1}'), KEYS, "w"),
]
# Both parser and repr recurse, each with a limit of its own.
DEEP = [
    (f"{depth} deep {where}", make(nested(depth)), "", None)
    for depth in (100, 500, 950, 990, 100_000)
    for where, make in (
        ("entry", lambda t: pack(f'{{"w":{t}}}')),
        ("dtype", lambda t: one(dtype=t)),
        ("shape", lambda t: one(shape=t)),
        ("offsets", lambda t: one(offsets=t)),
        ("metadata", meta),
    )
]

NAMES = [
    *("", " ", "w:0", "a/b", "größe", "重み", "\U0001f600", 'say "w"', "back\\slash", "a\nb", "\0"),
    *("\x7f", "\u2028", "dtype", "shape", "data_offsets", "metadata", "{}", "a,b", "[NaN]"),
    *("-0", "a:-0", "[-0]", "x, -0"),
]

# id, file, names in the order of their data, metadata
LEGAL = [
    ("no tensors", pack("{}"), [], {}),
    ("no tensors, padded", pack("{}      "), [], {}),
    ("white space", pack("{ \t\r\n}\n"), [], {}),
    ("no metadata", one(), ["w"], {}),
    ("null metadata", meta("null"), [], {}),
    ("empty metadata", meta("{}"), [], {}),
    (
        "metadata",
        meta('{"format":"pt","":"","é":"\\ud83d\\ude00"}'),
        [],
        {"format": "pt", "": "", "é": "😀"},
    ),
    ("metadata of brackets and -0", meta('{"range":"[-0, 1]"}'), [], {"range": "[-0, 1]"}),
    (
        "__metadata__ last",
        pack(f'{{"w":{E},"__metadata__":{{"k":"v"}}}}', b"abcd"),
        ["w"],
        {"k": "v"},
    ),
    ("__metadata__ by escape", pack('{"\\u005f_metadata__":{"k":"v"}}'), [], {"k": "v"}),
    ("dtype by escape", pack(f'{{"w":{E}}}'.replace("dtype", "dt\\u0079pe"), bytes(4)), ["w"], {}),
    ("padded", pack(f'{{"w":{E}}}   ', bytes(4)), ["w"], {}),
    (
        "spaced out",
        pack(f'{{"w":{E}}}'.replace(",", " ,\n").replace(":", "\t:\r"), bytes(4)),
        ["w"],
        {},
    ),
    ("scalar", one(shape="[]"), ["w"], {}),
    ("sixty dimensions", one(shape=f"[{'1,' * 59}1]"), ["w"], {}),
    ("empty tensor", one(shape="[0]", offsets="[0,0]", size=0), ["w"], {}),
    (
        "empty and huge",
        one(shape=f"[0,{2**64 - 1},{2**64 - 1}]", offsets="[0,0]", size=0),
        ["w"],
        {},
    ),
    ("empty tensor first", two((0, 4), (0, 0), 4), ["b", "a"], {}),
    ("empty tensor between", two((2, 2), (0, 2), 2), ["b", "a"], {}),
    ("empty tensors only", two((0, 0), (0, 0), 0), ["a", "b"], {}),
    ("listed backwards", two((2, 5), (0, 2), 5), ["b", "a"], {}),
    ("whole bytes of four bits", one(dtype='"F4"', shape="[1,8]"), ["w"], {}),
    (
        "whole bytes of six bits",
        one(dtype='"F6_E3M2"', shape="[4]", offsets="[0,3]", size=3),
        ["w"],
        {},
    ),
    *(
        (
            f"name {name!r}{how}",
            one(name=json.dumps(name, ensure_ascii=bool(how))[1:-1]),
            [name],
            {},
        )
        for name in NAMES
        for how in ("", " escaped")
        if not how or not name.isascii()
    ),
]
