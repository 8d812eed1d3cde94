"""Paths, endpoints, hosts and ports of the run file and of command lines: one rule for each. CONTRACT. Light:
standard library only.

**Paths.** `~` and `~user` are home folders; `$NAME` and `${NAME}` are environment variables, and one that is not set
is refused. Relative paths start at the working directory of the process, as in a shell. A slash at the end means
nothing. Empty paths and addresses such as `s3://…` are refused. Log lines name absolute paths.

**Models and data sets** are a folder, by the rule of paths, or a name on the Hugging Face hub: a folder of that name
comes first. `./NAME` and `NAME/` are folders and never names on the hub. `demo` is the model that is part of Sluice.

**Endpoints** are `tcp://HOST:PORT` or `ipc://FILE`. What ZeroMQ would accept and understand otherwise (99999 as port
34463, `5xx` as port 5) is refused here, when settings are read.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import re
from pathlib import Path

IPC_PATH_BYTES = 107
"""The longest path of a socket file on Linux."""
LAST_PORT = 65535
HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
"""A host's or an interface's name, or an IPv4 address."""


# Paths


def expand_path(text: str) -> str:
    """Expands `text` by the rule of paths; a relative path stays relative. Raises ValueError with what to do."""
    if not text.strip():
        raise ValueError("is empty; name a file or folder")
    if re.search(r"[\x00-\x1f\x7f]", text):
        raise ValueError("holds a control character; correct the path")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("is not UTF-8; rename the file or folder") from None
    if address := re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text):
        raise ValueError(
            f"is an address ({address[1]}://), not a path of this machine; mount or copy it, and name that"
        )
    expanded = os.path.expanduser(re.sub(r"\$(\w+|\{[^}]*\}?)", _variable, text))
    if expanded.startswith("~"):
        raise ValueError(
            f"begins with {expanded.partition('/')[0]}, a user whom this machine does not have; for a folder of that "
            f"name write ./{text}"
        )
    return expanded.rstrip("/") or "/"


def _variable(match: re.Match[str]) -> str:
    name = re.fullmatch(r"\{?([A-Za-z_]\w*)\}?", match[1])
    if name is None or match[1].startswith("{") != match[1].endswith("}"):
        raise ValueError(f"holds {match[0]}, which is no environment variable; expected $NAME or ${{NAME}}")
    if not (value := os.environ.get(name[1])):
        raise ValueError(f"holds the environment variable {name[1]}, which is not set; set it, or write the path out")
    return value


def expand_hub_name(text: str) -> str:
    """Expands a folder, or returns a name on the hub, by the rule of models. Raises ValueError with what to do."""
    if hub := re.match(r"https?://[^/]+/(?:datasets/)?([^/?#]+/[^/?#]+|[^/?#]+)", text):
        raise ValueError(f'is an address; write the name on the hub alone, such as "{hub[1]}"')
    path = expand_path(text)
    return path if path.startswith(("/", ".")) or not text.endswith("/") else f"./{path}"


def path_argument(text: str) -> Path:
    """A path on a command line, for argparse's `type`."""
    try:
        return Path(expand_path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f'path "{text}" {error}') from None


DEMO_MODEL = "demo"
"""The `model.name` of the language model that is part of Sluice; a folder of that name is `./demo`."""


def model_directory(name: str) -> Path:
    """The folder that a `model.name` means; it need not exist, since the name may be one on the hub."""
    return Path(__file__).parents[1] / "demo_lm" if name == DEMO_MODEL else Path(name)


# Endpoints


def expand_endpoint(text: str) -> str:
    """Checks an endpoint, and expands the path of an ipc:// one by the rule of paths. Raises ValueError."""
    scheme, separator, rest = text.partition("://")
    if not separator or scheme not in ("tcp", "ipc"):
        host = rest if separator else text
        example = f"tcp://{host}" if re.fullmatch(r"[\w.*\[\]:-]+:\d+", host) else "tcp://HOST:PORT"
        raise ValueError(f"names no transport: write {example}, or ipc://FILE on one machine")
    if scheme == "ipc":
        return f"ipc://{_socket_file(rest)}"
    host, port = split_endpoint(text)
    if not host:
        raise ValueError("names no host: write tcp://127.0.0.1:PORT for this machine, or tcp://HOST:PORT")
    if not port:
        example = host if host == rest.rstrip(":/") and (host[0] == "[" or ":" not in host) else "HOST"
        raise ValueError(f"names no port: write tcp://{example}:5710")
    if port != "*" and not (re.fullmatch(r"[0-9]{1,5}", port) and int(port) <= LAST_PORT):
        raise ValueError(f"has {port} as its port; expected 1 to {LAST_PORT}, or 0 for any free one")
    if fault := _tcp_host_fault(host, port):
        raise ValueError(fault)
    return text


def split_endpoint(endpoint: str) -> tuple[str, str]:
    """(host, port) of a tcp:// endpoint as written, "" for what is missing; brackets belong to the host."""
    rest = endpoint.partition("://")[2]
    match = re.fullmatch(r"(\[[^\]]*\]|[^\[\]]*?)(?::([^:]*))?", rest)
    return (match[1], match[2] or "") if match else (rest, "")


def _tcp_host_fault(host: str, port: str) -> str | None:
    if host.startswith("["):
        return (
            None
            if _is_ip(host[1:-1], 6)
            else f"has {host} as its host, which is no IPv6 address; expected one such as [::1]"
        )
    if _is_ip(host, 6) or _is_ip(f"{host}:{port}", 6):
        return "has an IPv6 address without brackets; write it as in tcp://[::1]:5710"
    return None if host == "*" else _host_fault(host)


def _host_fault(host: str) -> str | None:
    if re.fullmatch(r"[0-9.]+", host):
        return (
            None
            if _is_ip(host, 4)
            else f"has {host} as its host, which is no IPv4 address; expected one such as 127.0.0.1"
        )
    return None if HOST.fullmatch(host) else f"has {host} as its host; expected a name or an address, such as 127.0.0.1"


def _is_ip(text: str, version: int) -> bool:
    try:
        return ipaddress.ip_address(text).version == version
    except ValueError:
        return False


def _socket_file(rest: str) -> str:
    if rest == "*" or rest.startswith("@"):  # a file of ZeroMQ's choice; a name without a file
        return rest
    path = expand_path(rest)
    if (length := len(os.fsencode(path))) > IPC_PATH_BYTES:
        raise ValueError(f"has a path of {length} bytes, and {IPC_PATH_BYTES} at most can be bound; use a shorter one")
    return path


def unreachable(endpoint: str) -> str | None:
    """Says why nobody can connect to `endpoint`, which may be bound all the same; None when somebody can."""
    if endpoint == "ipc://*":
        return "stands for any free file; name the one that the trainer's log shows"
    if endpoint.startswith("ipc://"):
        return None
    host, port = split_endpoint(endpoint)
    if host == "*":
        return "stands for every address of the trainer's machine; name the one to connect to, as tcp://HOST:PORT"
    if port == "*" or int(port) == 0:
        return "stands for any free port; name the one that the trainer's log shows"
    return None


def is_ipv6(endpoint: str) -> bool:
    """Whether a socket for `endpoint` must have its IPv6 option set."""
    return endpoint.startswith("tcp://[")


def is_loopback(endpoint: str) -> bool:
    """True when no other machine can reach `endpoint` (ipc, or a loopback TCP address)."""
    if endpoint.startswith("ipc://"):
        return True
    host = re.sub(r"^tcp://\[?|\]?:[^:]*$", "", endpoint)
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_host(text: str) -> str:
    """Checks an address to listen on: an IP address or a host's name. Raises ValueError."""
    if text == "*" or not text.strip():
        raise ValueError("names no address; write 127.0.0.1 for this machine alone, or 0.0.0.0 for every address")
    if _is_ip(text, 6) or _is_ip(text, 4):
        return text
    if text.startswith("[") and text.endswith("]"):
        raise ValueError(f"has brackets, which an IPv6 address does without here; write {text[1:-1]}")
    if "://" in text or "/" in text or ":" in text:
        raise ValueError("is an address with more than a host; write the host alone, such as 127.0.0.1")
    if fault := _host_fault(text):
        raise ValueError(fault)
    return text


def check_host_name(text: str) -> str:
    """Checks a host's name or IPv4 address without scheme and port. Raises ValueError."""
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", text):
        raise ValueError("is no host's name; write it without scheme and port, such as monitor.example.org")
    return text


def check_port(number: int) -> int:
    """Checks a port. Raises ValueError."""
    if not 0 <= number <= LAST_PORT:
        raise ValueError(f"is no port; expected 1 to {LAST_PORT}, or 0 for any free one")
    return number
