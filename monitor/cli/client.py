"""Client of a running monitor's HTTP service, for `pull` and `top`."""

from __future__ import annotations

import ssl
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from monitor.cli.errors import Gone, MonitorError, NotModified, UsageError
from producer.common.parsing import ParseError, parse_object
from producer.common.toml import show_value

TIMEOUT_SECONDS = 30.0
LARGEST_DOCUMENT = 64 << 20
"""Bytes of a JSON document that are read."""
LARGEST_ERROR = 1 << 16
"""Bytes of the body of an error."""
TRANSIENT_STATUSES = (429, 500, 502, 503, 504)


class Monitor:
    """One monitor's HTTP service.

    `url` may be `host:port`, or the address of a page, with the token in ?token=.
    """

    def __init__(self, url: str, token: str | None = None) -> None:
        shown_url = show_value(url.partition("?")[0])  # without a token
        try:
            parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
            is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError as error:  # brackets that do not match, a port that is none
            raise UsageError(f"{shown_url} is no address of a monitor: {error}") from None
        if not is_usable:
            raise UsageError(f"{shown_url} is no address of a monitor; expected one such as http://127.0.0.1:8710")
        self.base = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        token = token or dict(urllib.parse.parse_qsl(parts.query)).get("token")
        self._client = _new_client({"Authorization": f"Bearer {token}"} if token else {})

    @contextmanager
    def open(self, path: str, headers: dict[str, str] | None = None, wait: float = 0.0) -> Iterator[httpx.Response]:
        """A response whose body is not read yet; it may take `wait` seconds longer than the network does.

        Raises Gone for a 404, NotModified for a 304, MonitorError for other refusals, and ConnectionError, also while
        the body is read, where another try may help.
        """
        address = self.base + path
        try:
            timeout = TIMEOUT_SECONDS + wait
            with self._client.stream("GET", address, headers=headers, timeout=timeout) as response:
                if not response.is_success:
                    raise _error_of(address, response)
                yield response
        except (httpx.InvalidURL, httpx.LocalProtocolError):
            raise UsageError("the address or the token holds characters that HTTP does not allow") from None
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            reason = str(error) or type(error).__name__
            raise ConnectionError(f"{address} cannot be reached ({reason}); is the monitor running there?") from None
        except httpx.TransportError as error:
            raise ConnectionError(f"the connection to {address} broke: {error or type(error).__name__}") from None
        except httpx.TooManyRedirects:
            raise MonitorError(f"{address} redirects in a circle; is this the address of a Sluice monitor?") from None

    def write_note(self, sae: str, latent: int, note: dict[str, Any]) -> None:
        """Keeps a note of a latent. Raises MonitorError where the monitor refuses, and ConnectionError."""
        _write(self._client, f"{self.base}/v1/notes/{urllib.parse.quote(sae)}/{latent}", note)

    def read(self, path: str, wait: float = 0.0) -> dict[str, Any] | None:
        """A JSON object; None where there is nothing new (204). Raises as `open` does."""
        with self.open(path, wait=wait) as response:
            if response.status_code == 204:
                return None
            text = read_body(response)
        return parse_document(text, self.base + path)


def _write(client: httpx.Client, address: str, document: dict[str, Any]) -> None:
    """PUTs a JSON object. Raises MonitorError or ConnectionError."""
    try:
        response = client.put(address, json=document, timeout=TIMEOUT_SECONDS)
    except httpx.TransportError as error:
        raise ConnectionError(f"the connection to {address} broke: {error or type(error).__name__}") from None
    if not response.is_success:
        try:
            reason = str(parse_object(response.content)["error"])
        except (ParseError, KeyError):
            reason = response.reason_phrase
        raise MonitorError(f"{address} answers {response.status_code}: {reason}")


def _new_client(headers: dict[str, str]) -> httpx.Client:
    """A client that leaves its headers out where it is redirected to another host. Raises UsageError."""
    try:
        return httpx.Client(
            headers={"Accept-Encoding": "identity", **headers},
            follow_redirects=True,
            verify=ssl.create_default_context(),  # the system's certificates; httpx has its own otherwise
            limits=httpx.Limits(max_keepalive_connections=0),  # a monitor may be restarted between two requests
        )
    except UnicodeError:
        raise UsageError("the address or the token holds characters that HTTP does not allow") from None
    except (ImportError, ValueError) as error:
        raise UsageError(f"the proxy in this environment cannot be used: {error}") from None


def read_body(response: httpx.Response, limit: int = LARGEST_DOCUMENT) -> bytes:
    """The body, cut after `limit` bytes."""
    body = bytearray()
    for chunk in response.iter_raw():
        body += chunk
        if len(body) >= limit:
            break
    return bytes(body[:limit])


def parse_document(text: bytes, address: str) -> dict[str, Any]:
    """The JSON object in a body. Raises MonitorError where there is none."""
    try:
        return parse_object(text)
    except ParseError as error:
        raise MonitorError(f"{address} is no JSON object ({error}); is this the address of a Sluice monitor?") from None


def _error_of(address: str, response: httpx.Response) -> Exception:
    """The exception for a status that is no success."""
    status = response.status_code
    if status == 304:
        return NotModified(f"{address} has not changed")
    try:
        reason = parse_object(read_body(response, LARGEST_ERROR))["error"]
    except (ParseError, KeyError):
        # A Sluice monitor explains itself in JSON; its metrics port and other servers do not.
        reason = f"{response.reason_phrase}; is this the address of a Sluice monitor, and its monitor.service_port?"
    message = f"{address} answers {status}: {reason}"
    if status in TRANSIENT_STATUSES:
        return ConnectionError(message)
    return Gone(message) if status in (404, 410) else MonitorError(message)
