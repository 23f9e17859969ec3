"""The process of one conversion: work comes as a line of JSON, what happens goes out as lines.

``{"progress": [bytes, name]}``, ``{"notify": sentence}``, and in the end ``{"done": [...]}`` or
``{"failed": sentence, "transient": bool}``.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import threading
import time
from typing import Any, NoReturn

from streamq.hub import is_hub

from .work import Work, carry_out, failure_of

#: Seconds between two lines of progress.
INTERVAL = 0.1


class _Progress:
    """Sums up what is done between two lines; called by all threads of the conversion."""

    def __init__(self, say: Any) -> None:
        self._say = say
        self._lock = threading.Lock()
        self._bytes = 0
        self._last = 0.0

    def __call__(self, n: int, name: str) -> None:
        now = time.monotonic()
        with self._lock:
            self._bytes += n
            if now - self._last < INTERVAL:
                return
            n, self._bytes, self._last = self._bytes, 0, now
        self._say({"progress": [n, name]})


def main() -> NoReturn:
    """Read the work, carry it out, say what became of it; see above.

    Ends at once when its standard input does: whoever started it is gone, however that ended.
    """
    gc.disable()  # as streamq.cli.main does, and why
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no line of ours
    lock = threading.Lock()

    def say(message: dict[str, Any]) -> None:
        with lock:
            print(json.dumps(message), file=out, flush=True)

    work = Work(**json.loads(sys.stdin.buffer.readline()))
    threading.Thread(target=_end_with_parent, args=[work], daemon=True).start()
    try:
        done = carry_out(work, _Progress(say), lambda line: say({"notify": line}))
        say({"done": done})
    except BrokenPipeError:
        os._exit(1)
    except BaseException as e:
        failure = failure_of(e)
        say({"failed": str(failure), "transient": failure.transient})
    os._exit(0)


def _end_with_parent(work: Work) -> None:
    sys.stdin.buffer.read()
    if is_hub(work.src):  # the directory was made for this process alone
        shutil.rmtree(work.settings["spool_dir"], ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    main()
