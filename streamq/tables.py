"""Tables that people write in TOML or YAML: read within limits, keys taken with their types."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamq.errors import PlanError

#: How deep a file may be nested.
MAX_NESTED = 16

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
          "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}  # fmt: skip


def bytes_of(text: str) -> int:
    """Bytes from a number with a unit: 512MiB, 5GB, 1.5GiB. Raises ValueError for anything else."""
    short = text.strip().lower().removesuffix("b")
    number = short.rstrip("kmgti")
    unit = _UNITS.get(short[len(number) :])
    size = float(number) * unit if unit else 0
    if not 1 <= size < 2**63:
        raise ValueError(text)
    return int(size)


def read_table(given: str | os.PathLike[str], what: str, most: int) -> Mapping[str, Any]:
    """The table in a file: ``.yaml`` and ``.yml`` are YAML, all else TOML.

    ``what``: the file in messages, such as "recipe". ``most``: its largest size in bytes. Raises
    PlanError for a file that cannot be read, is no such table, or is beyond the limits.
    """
    path = Path(given)
    text = read_text(path, what, most)
    return _yaml(path, text, what) if path.suffix in (".yaml", ".yml") else _toml(path, text, what)


def read_text(path: Path, what: str, most: int) -> str:
    """The text of a file. Raises PlanError as ``read_table`` does."""
    try:
        with path.open("rb") as file:
            raw = file.read(most + 1)
        text = raw.decode()
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else "it is not UTF-8"
        raise PlanError(f"the {what} {path} cannot be read: {why}.") from None
    if len(raw) > most:
        raise PlanError(f"the {what} {path} has more than {most} bytes.")
    return text


def _toml(path: Path, text: str, what: str) -> Mapping[str, Any]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as e:  # also numbers of thousands of digits
        raise PlanError(f"the {what} {path} is not valid TOML: {e}.") from None


def _yaml(path: Path, text: str, what: str) -> Mapping[str, Any]:
    try:
        import yaml
    except ImportError:
        raise PlanError(
            f"the {what} {path} is YAML, which needs PyYAML: pip install 'streamq[yaml]', or "
            "write it in TOML."
        ) from None
    try:
        # A few lines of aliases can stand for more than any memory holds, and 3,000 brackets take
        # the parser half a minute.
        depth = 0
        for event in yaml.parse(text):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent):
                raise PlanError(f"the {what} {path} has YAML aliases (*name); write them out.")
            if depth > MAX_NESTED:
                raise PlanError(f"the {what} {path} is nested more than {MAX_NESTED} deep.")
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise PlanError(f"the {what} {path} is not valid YAML: {' '.join(str(e).split())}.") from (
            None
        )
    if not isinstance(found, dict):
        raise PlanError(f"the {what} {path} must be a table of keys, got {found!r}.")
    return found


class Table:
    """One table: takes its keys with their types, and knows where it stands.

    What is of another type, is missing or is left at the end raises PlanError with that place.
    """

    def __init__(self, found: Mapping[str, Any], where: str) -> None:
        self._found = dict(found)
        self.where = where

    def names(self, key: str) -> tuple[str, ...]:
        """A list of texts, or one text."""
        value = self._found.pop(key, [])
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
            raise PlanError(
                f"{self.where}: {key} must be a text or a list of texts, got {value!r}."
            )
        return tuple(value)

    def text(self, key: str, known: tuple[str, ...] = ()) -> str | None:
        """A text, one of ``known`` if that is not empty; None where it is absent."""
        value = self._found.pop(key, None)
        if value is not None and (not isinstance(value, str) or (known and value not in known)):
            wanted = " or ".join(known) if known else "a text"
            raise PlanError(f"{self.where}: {key} must be {wanted}, got {value!r}.")
        return value

    def number(self, key: str) -> int | None:
        """A whole number; None where it is absent."""
        value = self._found.pop(key, None)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise PlanError(f"{self.where}: {key} must be a whole number, got {value!r}.")
        return value

    def real(self, key: str) -> float | None:
        """A number; None where it is absent."""
        value = self._found.pop(key, None)
        if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
            raise PlanError(f"{self.where}: {key} must be a number, got {value!r}.")
        return value

    def numbers(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers; () where it is absent."""
        value = self._found.pop(key, [])
        if not isinstance(value, list) or not all(type(v) is int for v in value):
            raise PlanError(f"{self.where}: {key} must be a list of whole numbers, got {value!r}.")
        return tuple(value)

    def size(self, key: str) -> int | None:
        """Bytes: a whole number, or a text such as "5GB"; None where it is absent."""
        value = self._found.pop(key, None)
        if value is None:
            return None
        try:
            return bytes_of(str(value) if type(value) is int else value)
        except (AttributeError, ValueError):
            raise PlanError(
                f"{self.where}: {key} must be a size like 512MiB or 5GB, got {value!r}."
            ) from None

    def flag(self, key: str) -> bool | None:
        """True or false; None where it is absent."""
        value = self._found.pop(key, None)
        if value is not None and not isinstance(value, bool):
            raise PlanError(f"{self.where}: {key} must be true or false, got {value!r}.")
        return value

    def tables(self, key: str) -> list[Table]:
        """An array of tables."""
        value = self._found.pop(key, [])
        if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
            raise PlanError(f"{self.where}: {key} must be an array of tables, written [[{key}]].")
        return [Table(v, f"{self.where}, {key} {i}") for i, v in enumerate(value, 1)]

    def need(self, key: str, value: Any) -> Any:
        """``value``, or a PlanError that ``key`` is missing."""
        if not value:
            raise PlanError(f"{self.where}: {key} is missing.")
        return value

    def done(self, *known: str) -> None:
        """Raise PlanError for a key that was not taken."""
        if self._found:
            key = sorted(map(str, self._found))[0]
            raise PlanError(
                f"{self.where}: unknown key {key!r}; known keys are {', '.join(known)}."
            )
