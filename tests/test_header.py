"""The header reader: what it refuses and in which words, what it takes, as the package does."""

import re

import pytest
from header_readers import package_reads, read, refusal
from headers import DEEP, LEGAL, MALFORMED, one
from safetensors import SafetensorError, deserialize

from streamq.tensors import DTYPES


@pytest.mark.parametrize(
    ("data", "sentence", "tensor"), [pytest.param(*row, id=i) for i, *row in MALFORMED + DEEP]
)
def test_malformed_file_is_refused_in_one_line(tmp_path, data, sentence, tensor):
    path = tmp_path / "any"
    path.write_bytes(data)
    message = refusal(path)
    assert re.search(sentence, message)
    assert tensor is None or repr(tensor) in message


def test_unreadable_path_is_refused(tmp_path):
    assert "cannot be opened: No such file" in refusal(tmp_path / "none")
    assert "cannot be read: Is a directory" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("data", "names", "metadata"), [pytest.param(*row, id=i) for i, *row in LEGAL]
)
def test_legal_file_is_read_as_the_package_reads_it(tmp_path, data, names, metadata):
    path = tmp_path / "any"
    path.write_bytes(data)
    seen = read(path)
    assert (list(seen[0]), seen[1]) == (names, metadata)
    assert seen == package_reads(path)


@pytest.mark.parametrize("tag", DTYPES)
def test_dtype_has_the_name_and_size_it_has_in_the_package(tmp_path, tag):
    path = tmp_path / "any"
    for extra in (-1, 0, 1):
        # 3 x 8 elements fill whole bytes at any width
        size = 24 * DTYPES[tag].bits // 8 + extra
        path.write_bytes(one(dtype=f'"{tag}"', shape="[3,8]", offsets=f"[0,{size}]", size=size))
        assert (package_reads(path) is None) == bool(extra)
        if extra:
            refusal(path)
        else:
            assert read(path) == package_reads(path)


def test_no_dtype_of_the_package_is_missing(tmp_path):
    """The package lists its dtypes when it is given another."""
    with pytest.raises(SafetensorError) as caught:
        deserialize(one(dtype='"F31"'))
    assert set(re.findall("`([A-Z0-9_]+)`", str(caught.value))) - {"F31"} == set(DTYPES)
