"""The two readers of a header, the package's and ours, in one form to compare."""

import pytest
from safetensors import SafetensorError, deserialize, safe_open

from streamq.checkpoint.header import read_header
from streamq.errors import CheckpointError

FILE = "model-00001-of-00002.safetensors"


def refusal(path, file=FILE):
    with pytest.raises(CheckpointError) as caught:
        read_header(str(path), file)
    message = str(caught.value)
    assert message.startswith(f"{file}: ")
    assert message.splitlines() == [message]
    return message


def package_reads(path):
    """The package's view: ({name: (dtype, shape, data)}, metadata), or None if it refuses."""
    try:
        data = {
            n: (t["dtype"], t["shape"], bytes(t["data"])) for n, t in deserialize(path.read_bytes())
        }
        with safe_open(path, framework="np") as f:
            slices = {n: f.get_slice(n) for n in f.keys()}  # noqa: SIM118
            shown = {n: (s.get_dtype(), s.get_shape()) for n, s in slices.items()}
            assert shown == {n: t[:2] for n, t in data.items()}
            return data, f.metadata() or {}
    except SafetensorError:
        return None


def read(path):
    """What read_header accepts, with each tensor's bytes, for comparison with the package."""
    data = path.read_bytes()
    header = read_header(str(path), FILE)
    assert {t.file for t in header.tensors} <= {FILE}
    assert [t.start for t in header.tensors] == sorted(t.start for t in header.tensors)
    tensors = {t.name: (t.dtype, list(t.shape), data[t.start : t.end]) for t in header.tensors}
    assert len(tensors) == len(header.tensors)
    return tensors, header.metadata
