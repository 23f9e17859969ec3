"""Generated headers, side by side with the package: only the checkpoint error may escape."""

import json
import re
from copy import deepcopy

import pytest
from header_readers import FILE, package_reads, read, refusal
from headers import NAMES, pack
from hypothesis import given
from hypothesis import strategies as st

from streamq.errors import CheckpointError
from streamq.tensors import DTYPES, TensorInfo


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("header") / "any"


def stricter(data):
    """Whether a file has what the package takes and this reader refuses on purpose."""
    raw = data[8 : 8 + int.from_bytes(data[:8], "little")]
    doubles = []

    def pairs(found):
        doubles.append(len(found) - len(dict(found)))
        return dict(found)

    entries = json.loads(raw, object_pairs_hook=pairs)
    entries.pop("__metadata__", None)
    plain = [
        isinstance(e, dict)
        and e.keys() == {"dtype", "shape", "data_offsets"}
        and isinstance(e["dtype"], str)  # the package takes {"F32": null} too
        for e in entries.values()
    ]
    return raw[:1] != b"{" or any(doubles) or not all(plain)


def agree(path, data):
    """Both readers see the same in these bytes; returns whether they accept them."""
    path.write_bytes(data)
    package = package_reads(path)
    try:
        seen = read(path)
    except CheckpointError:
        refusal(path)
        assert package is None or stricter(data)
        return False
    assert seen == package
    assert not stricter(data)
    return True


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=4) | st.sampled_from(NAMES)
SIZES = st.lists(st.integers(0, 3), max_size=3)


@st.composite
def tensors(draw):
    """The header of a valid file as a value, and its data, no two bytes of which repeat nearby."""
    header, end = {}, 0
    for name in draw(st.lists(TEXT.filter(lambda n: n != "__metadata__"), max_size=4, unique=True)):
        tag = draw(st.sampled_from(list(DTYPES)))
        shape = draw(SIZES)
        if DTYPES[tag].bits % 8:
            shape.append(4)
        info = TensorInfo(name, tag, tuple(shape), FILE, end)
        header[name] = {"dtype": tag, "shape": shape, "data_offsets": [end, info.end]}
        end = info.end
    header = {n: header[n] for n in draw(st.permutations(list(header)))}
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.none() | st.dictionaries(TEXT, TEXT, max_size=2))
    return header, b"".join((i * 40503 % 65536).to_bytes(2, "little") for i in range(end // 2 + 1))[
        :end
    ]


@st.composite
def valid_files(draw):
    header, data = draw(tensors())
    text = json.dumps(
        header, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1]))
    )
    return pack(text + " " * draw(st.integers(0, 8)), data)


TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|-?\d+|\s+|.', re.S)
NUMBERS = [0, 1, 2, 3, 4, 8, -1, 2**31, 2**32, 2**63, 2**64 - 1, 2**64]
STRINGS = [*DTYPES, "F31", "dtype", "shape", "data_offsets", "__metadata__", "w"]
ODD = '-0 1.0 1e999 01 true null NaN { } [ ] , : "" "\\ud800" "\\u0064type" [] {} [0] {"k":1} ,0'
TOKENS = st.sampled_from([*map(json.dumps, NUMBERS + STRINGS), *ODD.split()])


@st.composite
def mutated_tokens(draw):
    """A valid file whose header has tokens changed, put in, taken out or exchanged."""
    header, data = draw(tensors())
    parts = TOKEN.findall(json.dumps(header))
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from([r"-?\d", '"', "."]))
        at = [i for i, part in enumerate(parts) if re.match(kind, part)] or [0]
        i, j = draw(st.sampled_from(at)), draw(st.sampled_from(at))
        new = [draw(TOKENS)]
        match draw(st.sampled_from(["change", "insert", "delete", "swap", "copy"])):
            case "insert":
                parts[i:i] = new
            case "delete":
                del parts[i : i + 1]
            case "swap" if parts:
                parts[i], parts[j] = parts[j], parts[i]
            case "copy" if parts:
                parts[i] = parts[j]
            case _:
                parts[i : i + 1] = new
    return pack("".join(parts), data)


def as_object(pairs):
    return "{" + ",".join(f"{json.dumps(k)}:{text}" for k, text in pairs) + "}"


@st.composite
def mutated_fields(draw):
    """A valid file whose entries, or the keys in them, are repeated or left out."""
    header, data = draw(tensors())
    header["__metadata__"] = draw(st.sampled_from([None, {}, {"k": "v"}, {"a": "b", "k": "v"}]))
    entries = [(n, e and [(k, json.dumps(v)) for k, v in e.items()]) for n, e in header.items()]
    for _ in range(draw(st.integers(0, 5))):
        pairs = draw(st.sampled_from([entries, *(fields for _, fields in entries if fields)]))
        if draw(st.integers(0, 3)):
            again = deepcopy(draw(st.sampled_from(pairs)))
            pairs.insert(draw(st.integers(0, len(pairs))), again)
        elif len(pairs) > 1:
            pairs.remove(draw(st.sampled_from(pairs)))
    texts = [(n, "null" if fields is None else as_object(fields)) for n, fields in entries]
    return pack(as_object(texts), data)


@st.composite
def mutated_values(draw):
    """A file whose header is in order as JSON and wrong, or just different, as a header."""
    header, data = draw(tensors())
    names = [n for n in header if n != "__metadata__"]
    for _ in range(draw(st.integers(1, 2)) if names else 0):
        a, b = (header[draw(st.sampled_from(names))] for _ in "ab")
        key = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        match draw(st.sampled_from(["swap", "change", "odd"])):
            case "swap":
                a[key], b[key] = b[key], a[key]
            case "change" if key == "dtype":
                a[key] = draw(st.sampled_from(STRINGS))
            case "change":
                a[key] = draw(st.lists(st.sampled_from(NUMBERS), max_size=3))
            case _:
                a[key] = draw(JSON)
    data = data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data
    return pack(header, data + draw(st.binary(max_size=2)))


@st.composite
def mutated_bytes(draw):
    """A valid file with bytes flipped, put in, taken out, cut off or added."""
    data = bytearray(draw(valid_files()))
    for _ in range(draw(st.integers(1, 3))):
        i = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["flip", "insert", "delete", "truncate", "append"])):
            case "flip" if i < len(data):
                data[i] ^= 1 << draw(st.integers(0, 7))
            case "insert":
                data[i:i] = draw(st.binary(min_size=1, max_size=3))
            case "delete":
                del data[i : i + draw(st.integers(1, 3))]
            case "truncate":
                del data[i:]
            case _:
                data += draw(st.binary(min_size=1, max_size=3))
    if draw(st.booleans()) and len(data) >= 8:  # so that a longer header is still read as one
        data[:8] = max(0, data.rfind(b"}") - 7).to_bytes(8, "little")
    return bytes(data)


WORDS = st.sampled_from(STRINGS) | st.text(st.characters(exclude_categories=[]), max_size=3)
JSON = st.recursive(
    st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.integers() | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=16,
)
ENTRY = st.fixed_dictionaries({"dtype": JSON, "shape": JSON, "data_offsets": JSON})
HEADERS = JSON | st.dictionaries(WORDS, JSON | ENTRY, max_size=3)


@given(valid_files())
def test_valid_files_are_accepted_as_by_the_package(path, data):
    assert agree(path, data)


@given(st.binary() | st.binary().map(pack) | st.binary().map(lambda b: pack(b"{" + b)))
def test_bytes_are_judged_as_by_the_package(path, data):
    agree(path, data)


@given(HEADERS, st.binary(max_size=8))
def test_json_is_judged_as_by_the_package(path, header, data):
    agree(path, pack(json.dumps(header), data))


@given(mutated_tokens() | mutated_values())
def test_changed_headers_are_judged_as_by_the_package(path, data):
    agree(path, data)


@given(mutated_fields())
def test_repeated_and_missing_fields_are_judged_as_by_the_package(path, data):
    agree(path, data)


@given(mutated_bytes())
def test_changed_files_are_judged_as_by_the_package(path, data):
    agree(path, data)
