"""A limit for bytes a second, with a clock that only waiting moves."""

import threading

import pytest
from click.testing import CliRunner
from compressible import floats
from hypothesis import given
from hypothesis import strategies as st

from streamq import pace
from streamq.cli import cli
from streamq.pace import FREE, SLACK, Pace

SIZES = st.lists(st.integers(0, 5000), min_size=1, max_size=50)


class Clock:
    """Time that passes while somebody waits, and when it is told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def wait(self, seconds):
        assert seconds > 0
        self.now += seconds


@given(SIZES, st.integers(1, 10_000))
def test_no_more_than_the_rate_in_any_time(sizes, rate):
    clock = Clock()
    limited = Pace(rate, clock, clock.wait)
    passed = []
    for size in sizes:
        limited.take(size)
        passed.append((clock.now, size))
    for i, (begun, _) in enumerate(passed):
        for j in range(i, len(passed)):
            total = sum(size for _, size in passed[i + 1 : j + 1])
            assert total <= rate * (passed[j][0] - begun + SLACK) * (1 + 1e-9) + 1e-6


@given(SIZES, st.integers(1, 10_000))
def test_no_slower_than_the_rate(sizes, rate):
    clock = Clock()
    limited = Pace(rate, clock, clock.wait)
    for size in sizes:
        limited.take(size)
    assert clock.now - 1000 <= sum(sizes) / rate + 1e-6


def test_pauses_are_caught_up_on_only_a_little():
    clock = Clock()
    limited = Pace(100, clock, clock.wait)
    limited.take(100)
    clock.now += 60
    before = clock.now
    limited.take(500)
    assert clock.now - before == pytest.approx(5 - SLACK)


def test_threads_wait_for_their_own_bytes_one_behind_the_other():
    clock, waited = Clock(), []
    limited = Pace(100, clock, waited.append)  # a clock that stands still: all come at once
    for _ in range(3):
        limited.take(100)
    assert waited == pytest.approx([1 - SLACK, 2 - SLACK, 3 - SLACK])


def test_a_stop_lets_through_who_waits():
    limited = Pace(1)
    waiting = threading.Thread(target=limited.take, args=(1 << 30,))
    waiting.start()
    limited.stop()
    waiting.join(60)
    assert not waiting.is_alive()
    limited.take(1 << 30)
    FREE.take(1 << 60)


# --- where bytes go through it -----------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """Bytes that were taken by somebody with a limit."""
    taken = []

    def take(self, nbytes):
        if self._rate is not None:
            assert self._rate == 50_000_000
            taken.append(nbytes)

    monkeypatch.setattr(pace.Pace, "take", take)
    return taken


def size(folder):
    return sum(p.stat().st_size for p in folder.glob("*.safetensors"))


#: command: times that its source is read, at least and at most
COMMANDS = {
    "convert -s w8a8": (1, 1.01),
    "convert -s nvfp4a16": (1.1, 2.01),
    "reindex": (1, 1.01),
    "reindex --fuse": (1, 1.01),
    "convert -s bf16": (1, 1.01),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_all_bytes_read_and_written_are_counted(command, tmp_path, counted):
    src = floats(tmp_path / "in")
    verb, *options = command.split()
    args = [verb, str(src), str(tmp_path / "out"), *options, "--limit-rate", "50MB", "-q"]
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 0, result.output
    least, most = COMMANDS[command]
    read = sum(counted) - size(tmp_path / "out")
    assert least * 0.98 * size(src) <= read <= most * size(src)
