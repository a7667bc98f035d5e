"""Requests to the Hub that do not wait for ever: huggingface_hub sets no time-outs of its own."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import set_client_factory
from huggingface_hub.utils._http import default_client_factory


def set_timeout(seconds: float) -> None:
    """Give up a request of this process after so many seconds without a byte."""

    def with_timeout():  # noqa: ANN202  httpx or httpx2, as huggingface_hub has it
        client = default_client_factory()
        client.timeout = seconds
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
