"""Jobs wait for room on the disk, and no order of them waits for ever."""

import threading
from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from streamq.converting.rooms import Rooms, Space
from streamq.converting.scheduler import Scheduler


@st.composite
def runs(draw):
    """Shards of one or two outputs, jobs that write to one of each, and what may be on the disk."""
    owners = draw(st.integers(1, 2))
    spaces, numbers = [], []
    for owner in range(owners):
        sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
        numbers.append([len(spaces) + i for i in range(len(sizes))])
        spaces += [Space(size, owner) for size in sizes]
    limits = [draw(st.none() | st.integers(1, 20)) for _ in range(owners)]
    jobs = draw(
        st.lists(st.tuples(*(st.none() | st.sampled_from(of) for of in numbers)), max_size=20)
    )
    jobs = [[shard for shard in job if shard is not None] for job in jobs]
    return spaces, limits, [job for job in jobs if job], draw(st.integers(1, 3))


@given(runs())
def test_all_jobs_run_and_the_disk_is_enough(run):
    spaces, limits, jobs, workers = run
    rooms = Rooms(spaces, limits)
    made = [SimpleNamespace(shards=job) for job in jobs]
    scheduler = Scheduler(made, len(spaces), rooms)
    done, peaks, lock = [], [0] * len(limits), threading.Lock()

    def work(worker):
        while (job := scheduler.next(worker)) is not None:
            with lock:
                done.append(job)
                for owner in range(len(limits)):
                    there = [s for s in range(len(spaces)) if s in rooms]
                    used = sum(spaces[s].size for s in there if spaces[s].owner == owner)
                    peaks[owner] = max(peaks[owner], used)
            for shard in scheduler.done(job, []):
                scheduler.freed(shard)

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert sorted(map(id, done)) == sorted(map(id, made))
    if len(limits) == 1 and limits[0] is not None:  # several may have to make way for each other
        assert peaks[0] <= max(limits[0], *(space.size for space in spaces))
