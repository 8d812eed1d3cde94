"""A running monitor, as `pull` and `top` ask it over HTTP. The network side is the standard library's."""

from __future__ import annotations

import argparse
import http.client
import os
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from producer.common.parsing import ParseError, parse_object
from producer.common.toml import show_value

TIMEOUT_SECONDS = 30.0
LARGEST_DOCUMENT = 64 << 20
BROKEN = (ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException)
"""What goes wrong between here and the server, as against what goes wrong with this machine's disk."""


class MonitorError(Exception):
    """The monitor did not give what was asked for; `str(error)` says what was wrong and what to do."""


class NotModified(MonitorError):
    """What the tag in If-None-Match names is still what there is."""


class UsageError(MonitorError):
    """The command line cannot be carried out; exit code 2."""


class Gone(MonitorError):
    """The server does not have it (any more)."""


class Monitor:
    """One monitor's HTTP service. `host:port` is enough of an address; a page's address with ?token= will do too."""

    def __init__(self, url: str, token: str | None = None) -> None:
        shown = show_value(url.partition("?")[0])  # without a token
        try:
            parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError as error:  # brackets that do not match, a port that is none
            raise UsageError(f"{shown} is no address of a monitor: {error}") from None
        if not usable:
            raise UsageError(f"{shown} is no address of a monitor; expected one such as http://127.0.0.1:8710")
        self.base = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self._token = token or dict(urllib.parse.parse_qsl(parts.query)).get("token")

    @contextmanager
    def open(self, path: str, headers: dict[str, str] | None = None, wait: float = 0.0) -> Iterator[Any]:
        """A response, which may take `wait` seconds longer than the network does.

        Raises Gone for a 404, NotModified for a 304, MonitorError for other refusals, one of BROKEN for what another
        try may mend.
        """
        address = self.base + path
        request = urllib.request.Request(address, headers={"Accept-Encoding": "identity", **(headers or {})})
        if self._token:
            # To this server only, wherever it may redirect to.
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        try:
            answer = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS + wait)
        except urllib.error.HTTPError as error:
            raise _explain(address, error) from None
        except urllib.error.URLError as error:
            raise ConnectionError(
                f"{address} cannot be reached ({error.reason}); is the monitor running there?"
            ) from None
        except (ValueError, UnicodeError):
            raise UsageError("the address or the token holds characters that HTTP does not allow") from None
        with answer:
            yield answer

    def read(self, path: str, wait: float = 0.0) -> dict[str, Any] | None:
        """A JSON object; None where there is nothing new (204). Raises as `open` does."""
        with self.open(path, wait=wait) as answer:
            text = answer.read(LARGEST_DOCUMENT)
            if answer.status == 204:
                return None
        return document_of(text, self.base + path)


def document_of(text: bytes, address: str) -> dict[str, Any]:
    """The JSON object that was answered. Raises MonitorError when it is none."""
    try:
        return parse_object(text)
    except ParseError as error:
        raise MonitorError(f"{address} is no JSON object ({error}); is this the address of a Sluice monitor?") from None


def _explain(address: str, error: urllib.error.HTTPError) -> Exception:
    with error:
        body = error.read(1 << 16)
    if error.code == 304:
        return NotModified(f"{address} has not changed")
    try:
        reason = parse_object(body)["error"]
    except (ParseError, KeyError):
        # A Sluice monitor explains itself in JSON; the metrics port of one, and anybody else, does not.
        reason = f"{error.reason}; is this the address of a Sluice monitor, and its monitor.service_port?"
    if error.code in (429, 500, 502, 503, 504):
        return ConnectionError(f"{address} answers {error.code}: {reason}")
    return (Gone if error.code in (404, 410) else MonitorError)(f"{address} answers {error.code}: {reason}")


def add_address(parser: argparse.ArgumentParser) -> None:
    """The arguments that name a monitor; `monitor_of` makes one of them."""
    parser.add_argument("url", metavar="URL", help="where the monitor serves, such as http://127.0.0.1:8710")
    parser.add_argument(
        "--token", metavar="TOKEN", help="of a monitor that asks for one; better set as SLUICE_TOKEN, which `ps` hides"
    )


def monitor_of(given: argparse.Namespace) -> Monitor:
    return Monitor(given.url, given.token or os.environ.get("SLUICE_TOKEN"))
