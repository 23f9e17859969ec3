"""What carries out the shards of plans: this process (``Here``), or machines elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from streamq.checkpoint import Checkpoint
from streamq.planning import Plan
from streamq.quality import Quality
from streamq.writer import Destination

from .devices import Means
from .places import Output

if TYPE_CHECKING:
    from . import Settings


class Started(Protocol):
    """The shards of some plans, on their way.

    ``unmeasured``: an earlier run has written some without measuring what is asked for now.
    ``received``: bytes that the Hub has sent to other processes than this.
    """

    unmeasured: bool
    received: int

    @property
    def measured(self) -> list[tuple[Quality | None, int]]:
        """Of each plan what its weights lost, and the number of scales that were rounded."""

    def run(self) -> tuple[str, tuple[str, ...]]:
        """Bring all shards to their destinations; whose kernels ran, and remarks for people."""


class Engine(Protocol):
    """Where shards are made; all else of a conversion happens in this process."""

    def means(self, outputs: list[Output], settings: Settings) -> Means:
        """What there is to work with. Raises PlanError where that is not enough."""

    def start(
        self, source: Checkpoint, work: list[tuple[Plan, Destination]], means: Means, s: Settings
    ) -> Started:
        """Look at what an earlier run has left of the shards; the work begins with ``run``."""
