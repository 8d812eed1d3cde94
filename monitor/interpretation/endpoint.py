"""Chat completions of an OpenAI-compatible server: POST {endpoint}/chat/completions."""

from __future__ import annotations

import time
from dataclasses import dataclass

import httpx

from producer.common.parsing import ParseError, parse_object

TRIES = 4
PAUSE_SECONDS = 1.0
"""Before the second try; doubled before each further one."""
TRANSIENT_STATUSES = (408, 409, 429, 500, 502, 503, 504)
LONGEST_MESSAGE = 300
"""Characters of a server's error that are shown."""


class EndpointError(RuntimeError):
    """The server cannot be used; `str(error)` says why."""


@dataclass(frozen=True)
class Endpoint:
    """One model on one server."""

    url: str
    """As OpenAI's clients take it: up to and including /v1."""
    model: str
    key: str | None = None
    timeout_seconds: float = 120.0
    pause_seconds: float = PAUSE_SECONDS

    def ask(self, prompt: str, longest_answer: int = 400) -> str:
        """The answer to one message, at temperature 0. Raises EndpointError after TRIES."""
        address = f"{self.url.rstrip('/')}/chat/completions"
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": longest_answer,
        }
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        pause = self.pause_seconds
        for tries_left in reversed(range(TRIES)):
            try:
                response = httpx.post(address, json=body, headers=headers, timeout=self.timeout_seconds)
                if response.is_success:
                    return _answer(address, response)
                fault = f"answers {response.status_code}: {response.text[:LONGEST_MESSAGE]}"
                is_transient = response.status_code in TRANSIENT_STATUSES
            except httpx.TransportError as error:
                fault, is_transient = f"cannot be reached: {error or type(error).__name__}", True
            except (httpx.InvalidURL, httpx.UnsupportedProtocol, UnicodeError) as error:
                raise EndpointError(f"{address} is no address of a server: {error}") from None
            if not tries_left or not is_transient:
                raise EndpointError(f"{address} {fault}")
            time.sleep(pause)
            pause *= 2
        raise AssertionError("the last try returns or raises")


def _answer(address: str, response: httpx.Response) -> str:
    try:
        content = parse_object(response.content)["choices"][0]["message"]["content"]
    except (ParseError, KeyError, IndexError, TypeError):
        content = None
    if not isinstance(content, str):
        raise EndpointError(f"{address} answers without choices[0].message.content; is it an OpenAI-compatible server?")
    return content
