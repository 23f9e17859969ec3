"""The metadata of a model card: what the Hub reads at the top of README.md."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from streamq.errors import HubError
from streamq.trust import VERSION

from .client import api, patiently
from .files import TIMEOUT

#: What stays true of a quantized model, carried over from the card of the source.
_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")


def metadata_of(card: str | None) -> dict[str, Any]:
    """What is carried over from a card; {} without one, and for one that cannot be read."""
    if card is None:
        return {}
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        found: Any = ModelCard(card, ignore_metadata_errors=True).data
        data = found.to_dict()
    except (ValueError, TypeError, AttributeError, YAMLError):
        return {}
    return {key: text for key in _KEPT if (text := _texts(data.get(key)))}


def _texts(value: Any) -> str | list[str] | None:
    """A string, or several; None for anything else, as the Hub refuses cards with it.

    The code of Norwegian, no, is false to those who read YAML 1.1; the Hub reads 1.2.
    """
    found = ["no" if one is False else one for one in (value if type(value) is list else [value])]
    if not all(isinstance(one, str) and one for one in found):
        return None
    return found if isinstance(value, list) else found[0]


def card_text(
    base_model: str | None, tags: Iterable[str], library: str, kept: dict[str, Any], body: str
) -> str:
    """A card: metadata in YAML, then ``body`` in Markdown.

    ``kept``: from ``metadata_of``. ``library``: what loads the model, by its name on the Hub.
    """
    from huggingface_hub import ModelCardData

    if base_model:
        kept = {**kept, "base_model_relation": "quantized"}
    data = ModelCardData(base_model=base_model, library_name=library, tags=list(tags), **kept)
    return f"---\n{data.to_yaml().strip()}\n---\n\n{body}"


def validate(card: str, what: str) -> None:
    """Ask the Hub whether it takes the metadata of a card: it refuses a commit with others.

    ``what``: what the sentence of an error begins with. Raises HubError.
    """
    from huggingface_hub import get_session, hf_raise_for_status, utils

    untyped: Any = utils  # it does not export what it imports, mypy says
    url = f"{api().endpoint}/api/validate-yaml"
    body = {"content": card, "repoType": "model"}
    headers = untyped.build_hf_headers(library_name="streamq", library_version=VERSION)

    def ask() -> list[str]:
        answer = get_session().post(url, json=body, headers=headers, timeout=TIMEOUT)
        if answer.status_code == 400:
            return [str(error.get("message")) for error in answer.json().get("errors", ())]
        hf_raise_for_status(answer)
        return []

    if errors := patiently(ask, what):
        raise HubError(
            f"{what}: the Hub refuses the model card: {'; '.join(errors)}. License, language and "
            "pipeline tag are those in README.md of the source; mend them there."
        )


def is_model(name: object) -> bool:
    """Whether this is what models on the Hub are called, org/name."""
    return isinstance(name, str) and bool(re.fullmatch(r"[\w\-]{1,96}/[\w\-.]{1,96}", name))
