"""How to talk to the Hub: no request that waits for ever, and errors that tell no secret."""

import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import get_token, set_client_factory
from huggingface_hub.errors import (
    BadRequestError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils._http import default_client_factory, parse_ratelimit_headers

from recipes.errors import UserError

# Answers that another try may change: a time-out, a conflict with another commit, too many requests.
PASSING = {408, 409, 412, 425, 429}
FINAL = (BadRequestError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, UserError)
PHASES = ("connect", "read", "write", "pool")


def set_timeout(seconds: float) -> None:
    """Give up a request of this process after so many seconds without a byte.

    huggingface_hub sets no time-outs, and overrides those of its client where a method has its own.
    """

    def limit(request: Any) -> None:  # of httpx or httpx2, as huggingface_hub has it
        asked = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {p: min(seconds, asked.get(p) or seconds) for p in PHASES}

    def with_timeout() -> Any:
        client = default_client_factory()
        hooks = client.event_hooks
        client.event_hooks = hooks | {"request": [*hooks["request"], limit]}
        return client

    set_client_factory(with_timeout)


@contextmanager
def timeout(seconds: float) -> Iterator[None]:
    """The same for a while; afterwards what else uses the Hub here is as it was."""
    set_timeout(seconds)
    try:
        yield
    finally:
        set_client_factory(default_client_factory)


def is_final(error: Exception) -> bool:
    """Whether another try would end the same: the user has to do something first."""
    # That the Hub does not take the card is told as a ValueError.
    is_bad_card = isinstance(error, ValueError) and isinstance(error.__cause__, BadRequestError)
    if isinstance(error, FINAL) or is_bad_card:
        return True
    if not isinstance(error, HfHubHTTPError):
        return False
    return 400 <= error.response.status_code < 500 and error.response.status_code not in PASSING


def asked_to_wait(error: Exception) -> float:
    """Seconds after which the server wants to be asked again, as its answer says; else 0."""
    response = getattr(error, "response", None)
    if response is None:
        return 0.0
    after, limit = response.headers.get("Retry-After", ""), parse_ratelimit_headers(response.headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    return float(after) if after.isdigit() else 0.0


def words(error: BaseException) -> str:
    """An error in one line, without a token, and without the parts of addresses that may hold secrets."""
    response = getattr(error, "response", None)
    text = without_secrets(" ".join(str(error).split()) or type(error).__name__)
    text = textwrap.shorten(text.split(" For more information check:")[0], 300, placeholder=" ...")
    cause = f" ({words(error.__cause__)})" if isinstance(error, RuntimeError) and error.__cause__ else ""
    status = "" if response is None or str(response.status_code) in text else f"{response.status_code} "
    return f"{status}{text}{cause}"


def without_secrets(text: str) -> str:
    """The text without tokens, and without users, queries and fragments of addresses."""
    text = re.sub(r"(\w+://)[^\s/@]*@", r"\1", text)
    text = re.sub(r"(?<=[\w/])[?#][^\s'\"?#]*=[^\s'\"]*", "", text)
    if token := get_token():
        text = text.replace(token, "[token]")
    return re.sub(r"\bhf_[A-Za-z0-9]{16,}|(?<=Bearer )[^\s'\"]+", "[token]", text)
