"""Enough of Ray for the engine, in one process: tasks run when they are waited for.

What goes to a task and what comes back is pickled, as it would be. ``fate``: what happens to
each task in turn, None for nothing, LATE for a node that is lost when all is written, or an
exception.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

LATE = "late"


class RayError(Exception):
    """Base of those of Ray."""


class NodeDiedError(RayError):
    pass


class RayTaskError(RayError):
    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


class _Ref(NamedTuple):
    work: Callable[..., Any]
    args: bytes


class FakeRay:
    """Stands in for the module ``ray``, with a node for each number of ``cpus``.

    ``asked``: what a node is given before the work, and may be given otherwise.
    """

    exceptions = SimpleNamespace(
        RayError=RayError, RayTaskError=RayTaskError, NodeDiedError=NodeDiedError,
        WorkerCrashedError=type("WorkerCrashedError", (RayError,), {}),
        LocalRayletDiedError=type("LocalRayletDiedError", (RayError,), {}),
        ObjectLostError=type("ObjectLostError", (RayError,), {}),
        OutOfMemoryError=type("OutOfMemoryError", (RayError,), {}),
    )  # fmt: skip

    def __init__(self, *cpus: int) -> None:
        self.cpus = cpus
        self.fates: Iterator[Any] = iter(())
        self.begun: list[str] = []
        self.cancelled: list[Any] = []
        self.asked: Callable[..., tuple[Any, ...]] = lambda *args: args
        self.util = SimpleNamespace(
            scheduling_strategies=SimpleNamespace(
                NodeAffinitySchedulingStrategy=lambda node, soft: node
            )
        )

    def is_initialized(self) -> bool:
        return True

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {"NodeID": f"id{i}", "Alive": True, "Resources": {"CPU": float(n)} if n else {},
             "NodeName": f"node{i}", "NodeManagerHostname": "host"}
            for i, n in enumerate(self.cpus)
        ]  # fmt: skip

    def remote(self, **how: Any) -> Callable[..., Any]:
        assert how["max_retries"] == 0

        def wrap(work: Callable[..., Any]) -> Any:
            function = SimpleNamespace(remote=lambda *args: _Ref(work, pickle.dumps(args)))
            function.options = lambda scheduling_strategy: function
            return function

        return wrap

    def put(self, value: Any) -> Any:
        return value

    def wait(self, refs: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        return refs[:1], refs[1:]

    def get(self, ref: Any) -> Any:
        args = pickle.loads(ref.args)
        if ref.work.__name__ == "_on_node":
            self.begun.append(args[2])
            fate = next(self.fates, None)
            if isinstance(fate, BaseException):
                raise fate
            if fate == LATE:
                ref.work(*args)
                raise NodeDiedError("The node died.\nMore of it.")
        else:
            args = self.asked(*args)
        try:
            return pickle.loads(pickle.dumps(ref.work(*args)))
        except Exception as e:
            raise RayTaskError(e) from None

    def cancel(self, ref: Any) -> None:
        self.cancelled.append(ref)

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: "id0")
