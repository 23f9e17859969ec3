"""Where conversions are carried out: in this process, or on the nodes of a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from streamq.converting import Engine
from streamq.errors import PlanError

__all__ = ["address_of", "opened"]


def address_of(name: str) -> str | None:
    """The address in the name of an engine: "" where Ray finds its own, None for ``local``.

    Raises PlanError for anything else.
    """
    kind, colon, address = name.partition(":")
    if name == "local":
        return None
    if kind != "ray" or (colon and not address):
        raise PlanError(
            f"{name!r} is no engine: local, or ray, ray:auto, ray:HOST:PORT, ray:ray://HOST:PORT."
        )
    return address


@contextmanager
def opened(name: str, src: str | os.PathLike[str]) -> Iterator[Engine | None]:
    """The engine of a name, for one source; None for ``local``, as ``convert_all`` takes it.

    ``src``: what nodes open. Raises PlanError where there is no cluster, or no Ray.
    """
    address = address_of(name)
    if address is None:
        yield None
        return
    from .ray import Ray

    with Ray(address, src) as engine:
        yield engine
