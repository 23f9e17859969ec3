"""Many conversions from one command: what is asked for, what is done already, what runs at once.

``jobs`` reads files and lines, ``look`` plans, ``pool`` starts what there is room for, an
``Engine`` carries it out, ``state`` outlives every way for it to end.
"""

from .jobs import JOB_KEYS, MAX_FILE, RUN_KEYS, Asked, Job, read_jobs
from .look import Kept, Planned
from .process import Processes
from .run import lack_of, plan_all, run
from .state import State
from .types import How, Outcome, Task, Watch
from .work import Engine, JobError, Work, carry_out

__all__ = [
    "JOB_KEYS", "MAX_FILE", "RUN_KEYS", "Asked", "Engine", "How", "Job", "JobError", "Kept",
    "Outcome", "Planned", "Processes", "State", "Task", "Watch", "Work", "carry_out", "lack_of",
    "plan_all", "read_jobs", "run",
]  # fmt: skip
