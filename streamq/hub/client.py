"""The client of the Hub, what its errors mean, and when to try again.

Endpoint, token, proxies and time limits are those of huggingface_hub, from its variables
(``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HUB_DOWNLOAD_TIMEOUT``) and from ``hf auth login``.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from streamq.errors import HubError, Stopped, StreamqError
from streamq.trust import VERSION

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")

#: Failures in a row, without a byte between them, after which the Hub is given up.
TRIES = 6
#: Seconds before the second try; doubled each time, up to LONGEST. Half of it is chance, so that
#: connections that broke together do not come back together.
FIRST, LONGEST = 0.5, 16.0
#: Most seconds that a Retry-After is waited for; the windows of the Hub's limits are 300.
PATIENCE = 330.0
#: Of an address what lets others in: a login in front of the host, the signature behind the path.
_SECRET = re.compile(r"(?<=://)[^/\s'\"]*@|(?<=[\w/])\?[^\s'\"]*=[^\s'\"]*")
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}


class Again(Exception):
    """A failure that may well be gone the next time; its text says what failed."""


class Stop(Protocol):
    """What tells that somebody does not want the answer any more: a threading.Event."""

    def is_set(self) -> bool:
        """Whether to stop."""

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for it; whether to stop."""


def endpoint() -> str | None:
    """The address of the Hub where the environment names one, as it is now."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


def api() -> HfApi:
    """A client with the endpoint and the token that are set now."""
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint(), library_name="streamq", library_version=VERSION)


def patiently(call: Callable[[], T], what: str, stop: Stop | None = None) -> T:
    """The result of ``call``, which is tried again where the Hub or the way there failed.

    ``what``: what the sentence of an error begins with, ``org/repo@revision`` or a file of it.
    Raises HubError, and Stopped when ``stop`` says so.
    """
    tries = 0
    while True:
        try:
            return call()
        except Exception as e:
            tries += 1
            pause_before(tries, e, what, stop)


def pause_before(tries: int, error: Exception, what: str, stop: Stop | None = None) -> None:
    """Wait after the failure number ``tries`` in a row; raise what it means if that was the last.

    Waits as long as the Hub says (Retry-After), else longer each time.
    """
    if isinstance(error, StreamqError | Stopped):
        raise error
    status, headers = _answer(error)
    if tries >= TRIES or not _is_transient(error, status):
        raise translated(error, what) from error
    asked = retry_after(headers)
    if asked is not None and asked > PATIENCE:
        raise translated(error, what) from error
    import random

    seconds = min(LONGEST, FIRST * 2 ** (tries - 1)) * random.uniform(0.5, 1)
    if asked is not None:
        seconds += asked
    if stop is None:
        time.sleep(seconds)
    elif stop.wait(seconds):
        raise Stopped


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that an answer asks to wait; None where it does not.

    ``Retry-After`` in seconds or as a date (RFC 9110), else ``t`` of ``RateLimit`` where nothing
    is left (draft-ietf-httpapi-ratelimit-headers-09), which the Hub sends.
    """
    said = {name.lower(): value.strip() for name, value in headers.items()}
    value = said.get("retry-after", "")
    if value.isdigit():
        return float(value)
    if value:
        from email.utils import parsedate_to_datetime

        try:
            return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
        except ValueError:
            return None
    left = re.search(r";\s*r=0\s*;\s*t=(\d+)", said.get("ratelimit", ""))
    return float(left.group(1)) if left else None


def translated(error: Exception, what: str) -> StreamqError:
    """What an error of huggingface_hub, or of HTTP below it, means, in one sentence."""
    from huggingface_hub import errors

    if isinstance(error, StreamqError):
        return error
    status, headers = _answer(error)
    if isinstance(error, Again):
        say = f"{error}."
    elif isinstance(error, errors.OfflineModeIsEnabled):
        say = (
            "HF_HUB_OFFLINE is set; unset it, or give the directory of a download (`hf download`) "
            "in place of the address."
        )
    elif isinstance(error, errors.GatedRepoError):
        say = (
            "the repository is gated; ask for access on its page, and log in with `hf auth login` "
            "or set HF_TOKEN."
        )
    elif isinstance(error, errors.RepositoryNotFoundError):
        say = (
            "no such repository, or one that this login may not see; check the name, and log in "
            "with `hf auth login` or set HF_TOKEN if it is private."
        )
    elif isinstance(error, errors.RevisionNotFoundError):
        say = "the repository has no such revision; check the branch, tag or commit behind the @."
    elif isinstance(error, errors.EntryNotFoundError):
        say = "not in the repository at this revision; check the folder."
    elif status == 401:
        say = "the Hub does not know this token; log in again with `hf auth login`."
    elif status == 403:
        say = f"the Hub refused: {_reason(error)}; check what the token is allowed to do."
    elif status == 429:
        asked = retry_after(headers)
        when = f"in {asked:.0f} s" if asked else "later"
        say = f"too many requests for the Hub; run again {when}, with a login it allows more."
    elif status is not None:
        later = "; run again later" if status in _TRANSIENT else ""
        say = f"the Hub answered {status}: {_reason(error)}{later}."
    elif isinstance(error, errors.LocalTokenNotFoundError):
        say = "this needs a login; `hf auth login`, or set HF_TOKEN."
    elif "Timeout" in type(error).__name__:
        say = (
            "the Hub did not answer in time; run again, or raise HF_HUB_DOWNLOAD_TIMEOUT (seconds)."
        )
    elif isinstance(error, errors.HfHubHTTPError.__bases__[0]):
        say = (
            f"the Hub cannot be reached: {_reason(error)}; check the network, the proxy and "
            "HF_ENDPOINT, then run again."
        )
    else:
        say = f"{type(error).__name__}: {_reason(error)}."
    found = HubError(f"{what}: {say}")
    found.transient = _is_transient(error, status)
    return found


def _answer(error: Exception) -> tuple[int | None, Mapping[str, str]]:
    """Status and headers of the answer that an error is about."""
    response: Any = getattr(error, "response", None)
    if response is None:
        return None, {}
    return response.status_code, response.headers


def _is_transient(error: Exception, status: int | None) -> bool:
    """Whether the same request may well succeed the next time.

    Which HTTP library huggingface_hub uses depends on its version; the base of its errors tells.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, Again):
        return True
    if status is not None:
        return status in _TRANSIENT
    if isinstance(error, OfflineModeIsEnabled) or type(error).__name__ == "UnsupportedProtocol":
        return False
    closed = isinstance(error, RuntimeError) and "client has been closed" in str(error)
    return closed or isinstance(error, HfHubHTTPError.__bases__[0])


def _reason(error: Exception) -> str:
    """The first line of what an error says, and the points of a list behind it."""
    text = getattr(error, "server_message", None) or str(error) or type(error).__name__
    first, *more = str(text).strip().splitlines()
    said = " ".join([first, *(line for line in more if line.startswith("- "))])
    return _SECRET.sub("", said).removesuffix(".")
