"""Types of the values in a run file, and the base class of its tables. CONTRACT. Light: pydantic only."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from producer.common.addresses import (
    check_host,
    check_host_name,
    check_port,
    expand_endpoint,
    expand_hub_name,
    expand_path,
)


def _to_whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _check_device(name: str) -> str:
    if name in ("auto", "cpu", "cuda") or re.fullmatch(r"cuda:[0-9]+", name):
        return name
    raise ValueError('is no device; expected "auto", "cpu", "cuda", or one GPU by number, such as "cuda:1"')


def _check_corpus_name(name: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", name):
        return name
    raise ValueError('is no name; expected letters, digits, ".", "-" and "_", such as "web"')


def _check_devices(names: list[str]) -> list[str]:
    if strange := [name for name in names if not re.fullmatch(r"cuda:[0-9]+|cpu|disk", name)]:
        raise ValueError(f'has {strange[0]!r}; expected GPUs by number, such as "cuda:0", then "cpu" and "disk"')
    if names != sorted(names, key=_device_rank):
        raise ValueError('is in another order than GPUs, "cpu", "disk", in which they are filled')
    if names == ["disk"] or len(set(names)) < len(names):
        raise ValueError('needs each device once, and one that computes: a GPU or "cpu"')
    return names


def _device_rank(name: str) -> int:
    return ("cuda", "cpu", "disk").index(name.split(":")[0])


def _check_range(text: str) -> str:
    if re.fullmatch(r"(not )?-?\d*:-?\d*(:[1-9]\d*)?", text) and not text.endswith(("-", "-:")) and "-:" not in text:
        return text
    raise ValueError('is no range of positions; expected a slice, such as "8:", "0:64:2" or "not 0:8"')


Whole = Annotated[int, BeforeValidator(_to_whole)]
"""A whole number, which may be written as 1e6."""
Positive = Annotated[Whole, Field(gt=0)]
Natural = Annotated[Whole, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0)]
SocketSeconds = Annotated[float, Field(gt=0, le=86_400)]
"""Seconds that ZeroMQ counts itself, as a 32-bit number of milliseconds."""
SecondsOrNever = Annotated[float, Field(gt=0, allow_inf_nan=True)]
"""Seconds after which something happens; inf: never."""
PathText = Annotated[str, AfterValidator(expand_path)]
"""A path in the run file."""
HubName = Annotated[str, AfterValidator(expand_hub_name)]
"""A model or a data set in the run file."""
Endpoint = Annotated[str, AfterValidator(expand_endpoint)]
"""A ZeroMQ endpoint in the run file."""
Host = Annotated[str, AfterValidator(check_host)]
"""An address that a process listens on."""
HostName = Annotated[str, AfterValidator(check_host_name)]
"""A name by which others call a host."""
Port = Annotated[int, AfterValidator(check_port)]
"""A port that a process listens on; 0 is any free one."""
PositionRange = Annotated[str, AfterValidator(_check_range)]
"""Positions of a window, as a slice."""
CorpusName = Annotated[str, AfterValidator(_check_corpus_name)]
"""The name of one corpus of a mixture."""
Device = Annotated[str, AfterValidator(_check_device)]
Devices = Annotated[list[str], AfterValidator(_check_devices)]
"""Devices that share a model."""


class Table(BaseModel):
    """One table of the run file: unknown keys and wrong types are refused, values never change afterwards."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
