"""z, q, k and v of the attention inside one block, located by experiment.

    v  the projection whose output, times −2, makes the input of a later projection −2 times itself, and whose first
       position reaches the others there
    z  that input: what the heads gather, before the output projection
    q  the projection whose output at one position reaches z at that position alone
    k  the projection whose output at one position reaches z at other positions; with q and k both negated, z stays

Of queries, keys and values that share one projection, the channels are found among the orders in use: GPT-2's [q | k |
v], GPT-NeoX' (q, k, v) for each head, Falcon's groups of queries with a key and a value, CodeGen's quarters. q, k and v
are taken where they leave their projection, before norms and rotary position embeddings, as TransformerLens does.

A state-space, convolution or gated linear block has no such v, so it has no heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from producer.lm.anatomy import BlockCall, projections
from producer.lm.hooks import Channels, HookLocation, attach

QUERY_POSITION = 1
"""Where q and k are changed: before the last position, which only itself attends to, and after the first."""


@dataclass(frozen=True)
class Heads:
    """The location of an activation of all heads of one attention, head after head."""

    location: HookLocation
    width: int
    """Length of the activation."""
    count: int
    """Number of heads, of k and v those that share keys and values; 0 where heads are not consecutive channels."""

    def head(self, index: int) -> HookLocation:
        """The location of one head."""
        size = self.width // self.count
        channels = self.location.channels or Channels(1, self.width, 0, self.width)
        group, place = divmod(index * size, channels.stop - channels.start)
        start = group * channels.width + channels.start + place
        return replace(self.location, channels=Channels(1, channels.groups * channels.width, start, start + size))


@dataclass(frozen=True)
class AttentionParts:
    """What hooks have names for; None for what the attention does not have."""

    z: Heads | None = None
    q: Heads | None = None
    k: Heads | None = None
    v: Heads | None = None


@dataclass(frozen=True)
class _Layout:
    """Where queries, keys and values lie in the output of one projection; None for what is projected elsewhere."""

    q: Channels | None
    k: Channels | None
    v: Channels


def find_attention(call: BlockCall, config: Any) -> AttentionParts:
    """The parts of the attention in a block. `config` is the text model's."""
    heads = getattr(config, "decoder_attention_heads", None) or getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int) or heads < 1 or call.input.shape[-2] <= QUERY_POSITION + 1:
        return AttentionParts()
    experiment = _Experiment(call)
    for path, layout in _value_candidates(experiment, config, heads):
        channels = None if layout is None else layout.v
        z = experiment.find_output(experiment.output(path, channels).location)
        if z is not None and experiment.inputs[z].shape[-1] % heads == 0:
            return _parts(experiment, z, path, layout, heads)
    return AttentionParts()


def missing_attention_message(kind: str, parts: AttentionParts, block: nn.Module, path: str) -> str:
    """The sentence that says why a block lacks z, q, k or v, and what to hook instead."""
    name, children = type(block).__name__, ", ".join(f"{path}.{name}" for name, _ in block.named_children())
    if parts.z is None:
        return (
            f"{name} has no attention whose values leave a projection of its own and reach an output projection "
            "unchanged but for the weights of attention (state-space and convolution blocks have none, some models "
            f"normalise values or share those of another block), so {kind} is not defined; use a module path: "
            f"{children}"
        )
    return (
        f"in {name}, {kind} is not what one projection gives (latent attention puts keys together from two, some "
        f"blocks share those of another); use attn.hook_z or a module path: {children}"
    )


@dataclass(frozen=True)
class _Output:
    """What one projection gives, or some channels of it."""

    location: HookLocation
    width: int


class _Experiment:
    """Calls of one block in which outputs of its projections are changed, and the inputs of all projections then."""

    def __init__(self, call: BlockCall) -> None:
        self._call = call
        self._tokens = call.input.shape[-3:-1]
        self.widths: dict[str, int] = {}
        """Of the outputs, by path, in the order of their calls: one activation for each token, in a single call."""
        self.inputs = self._first_run()
        """Without changes, [windows, context, width] by path."""

    def output(self, path: str, channels: Channels | None = None) -> _Output:
        """The output of a projection, or some channels of it."""
        location = replace(self._call.location(path, "output"), channels=channels)
        width = self.widths[path] if channels is None else channels.groups * (channels.stop - channels.start)
        return _Output(location, width)

    def input_location(self, path: str) -> HookLocation:
        """The input of a projection."""
        return self._call.location(path, "input")

    def before(self, path: str) -> list[str]:
        """The projections called before this one, the last first."""
        paths = list(self.widths)
        return paths[: paths.index(path)][::-1]

    def run(self, changes: Mapping[HookLocation, Callable[[Tensor], Tensor]]) -> dict[str, Tensor]:
        """The inputs of all projections in a call with `changes`."""
        inputs: dict[str, Tensor] = {}
        with ExitStack() as handles:
            for location, change in changes.items():
                handles.enter_context(attach(location, change))
            for path in self.inputs:
                handles.enter_context(attach(self._call.location(path, "input"), partial(self._record, inputs, path)))
            self._call.repeat(self._call.input)
        return inputs

    def find_output(self, values: HookLocation) -> str | None:
        """The projection whose input is linear in `values` and mixes their positions; None when there is none."""
        doubled = self.run({values: lambda x: -2 * x})
        linear = [path for path, x in self.inputs.items() if path in doubled and _is_equal(doubled[path], -2 * x)]
        if not linear:
            return None
        moved = self.run({values: partial(self._change_at, 0)})
        return next((path for path in linear if not _is_equal(moved[path][:, 1:], self.inputs[path][:, 1:])), None)

    def reach(self, output: _Output, z: str) -> tuple[bool, bool]:
        """Whether a change at one position changes z there, and at other positions."""
        changed = self.run({output.location: partial(self._change_at, QUERY_POSITION)})[z]
        changes = [not _is_equal(changed[:, t], self.inputs[z][:, t]) for t in range(self._tokens[1])]
        return changes.pop(QUERY_POSITION), any(changes)

    def reaches_first_heads(self, v: _Output, z: str, heads: int, groups: int) -> bool:
        """Whether the first of `groups` of values reaches its heads of z, the first ones, and no other."""
        size, channels = v.width // groups, v.location.channels or Channels(1, v.width, 0, v.width)
        first = Channels(1, channels.groups * channels.width, channels.start, channels.start + size)
        changed = self.run({replace(v.location, channels=first): torch.neg})[z].unflatten(-1, (groups, -1))
        same = self.inputs[z].unflatten(-1, (groups, -1))
        return _is_equal(changed[..., 1:, :], same[..., 1:, :]) and not _is_equal(changed[..., 0, :], same[..., 0, :])

    def keeps(self, z: str, locations: Iterable[HookLocation]) -> bool:
        """Whether z stays with all `locations` negated."""
        return _is_equal(self.run({location: torch.neg for location in locations})[z], self.inputs[z])

    def _first_run(self) -> dict[str, Tensor]:
        counts: dict[str, int] = {}
        inputs: dict[str, Tensor] = {}

        def record_output(path: str, y: Any) -> None:
            counts[path] = counts.get(path, 0) + 1
            if isinstance(y, Tensor) and y.numel() // y.shape[-1] == self._tokens.numel():
                self.widths[path] = y.shape[-1]

        with ExitStack() as handles:
            for path in projections(self._call.block):
                handles.enter_context(attach(self._call.location(path, "input"), partial(self._record, inputs, path)))
                handles.enter_context(attach(self._call.location(path, "output"), partial(record_output, path)))
            self._call.repeat(self._call.input)
        self.widths = {path: width for path, width in self.widths.items() if counts[path] == 1 and path in inputs}
        return {path: inputs[path] for path in self.widths}

    def _record(self, inputs: dict[str, Tensor], path: str, x: Any) -> None:
        if isinstance(x, Tensor) and x.numel() // x.shape[-1] == self._tokens.numel():
            inputs[path] = x.reshape(*self._tokens, -1).clone()

    def _change_at(self, position: int, x: Tensor) -> Tensor:
        y = x.reshape(*self._tokens, -1).clone()
        y[:, position] *= -2
        return y.reshape(x.shape)


def _value_candidates(experiment: _Experiment, config: Any, heads: int) -> Iterator[tuple[str, _Layout | None]]:
    """Projections, and then parts of projections, whose output may be the values."""
    yield from ((path, None) for path in experiment.widths)
    groups = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or heads
    for path, width in experiment.widths.items():
        yield from ((path, layout) for layout in _layouts(width, heads, groups, getattr(config, "v_head_dim", None)))


def _layouts(width: int, heads: int, groups: int, value_size: int | None) -> list[_Layout]:
    """The orders in use of what one projection of `width` gives; `groups` of the `heads` share keys and values."""
    layouts = []
    for count in dict.fromkeys([groups, 1, heads]):
        size, rest = divmod(width, heads + 2 * count)
        if heads % count or rest:
            continue
        for parts in dict.fromkeys([1, count]):  # all heads together, or group by group
            q, k, part = heads * size // parts, count * size // parts, width // parts
            layouts.append(
                _Layout(
                    Channels(parts, part, 0, q), Channels(parts, part, q, q + k), Channels(parts, part, q + k, part)
                )
            )
    if not heads % 4 and not width % 12:  # CodeGen's, once computed on four devices: [q | v | k] in each quarter
        part, size = width // 4, width // 12
        layouts.append(
            _Layout(Channels(4, part, 0, size), Channels(4, part, 2 * size, part), Channels(4, part, size, 2 * size))
        )
    for count in dict.fromkeys([1, groups]):  # keys and values, whose queries are projected elsewhere
        part, rest = divmod(width, count)
        for size in {part // 2, value_size or 0}:
            if not rest and 0 < size < part:
                layouts.append(
                    _Layout(None, Channels(count, part, 0, part - size), Channels(count, part, part - size, part))
                )
    return layouts


def _parts(experiment: _Experiment, z: str, values: str, layout: _Layout | None, heads: int) -> AttentionParts:
    """The parts around a z and a v."""
    z_width = experiment.inputs[z].shape[-1]
    v = experiment.output(values, layout.v if layout else None)
    groups = v.width * heads // z_width
    is_by_head = groups > 0 and heads % groups == 0 and experiment.reaches_first_heads(v, z, heads, groups)
    q, k = _queries_and_keys(experiment, z, values, layout, heads, groups) if groups else (None, None)
    return AttentionParts(
        Heads(experiment.input_location(z), z_width, heads if is_by_head else 0),
        None if q is None else Heads(q.location, q.width, heads),
        None if k is None else Heads(k.location, k.width, groups),
        Heads(v.location, v.width, groups if is_by_head else 0),
    )


def _queries_and_keys(
    experiment: _Experiment, z: str, values: str, layout: _Layout | None, heads: int, groups: int
) -> tuple[_Output | None, _Output | None]:
    """The outputs that z depends on as on queries and on keys, those computed last first."""
    before = experiment.before(z)
    queries = [
        experiment.output(path) for path in before if experiment.reach(experiment.output(path), z) == (True, False)
    ]
    keys = [
        experiment.output(path) for path in before if path != values and experiment.reach(experiment.output(path), z)[1]
    ]
    if layout is not None:
        keys = [experiment.output(values, layout.k)]
        if layout.q is not None:
            query, key = experiment.output(values, layout.q), keys[0]
            is_order = experiment.reach(query, z) == (True, False) and experiment.reach(key, z)[1]
            return (query, key) if is_order else (None, None)
    # Not where keys and values share a projection: halves of latent attention's queries are with and without positions.
    halves = [half for query in queries for half in _halves(experiment, query, heads)] if layout is None else []
    for query in (*queries, *halves):
        for key in keys:
            if experiment.keeps(z, (query.location, key.location)):
                return query, key
    for query in queries:
        for key in keys:
            # A norm with a bias follows (StableLM), so that nothing can be negated without a trace.
            if layout is None and query.width * groups == key.width * heads:
                return query, key
    return queries[0] if queries else None, None


def _halves(experiment: _Experiment, query: _Output, heads: int) -> list[_Output]:
    """The halves of each head's part of an output: in Qwen 3.5 a query and the gate of z share one projection."""
    size, rest = divmod(query.width, 2 * heads)
    if rest or query.location.channels is not None:
        return []
    return [
        _Output(replace(query.location, channels=Channels(heads, 2 * size, start, start + size)), heads * size)
        for start in (0, size)
    ]


def _is_equal(x: Tensor, y: Tensor) -> bool:
    """Whether x and y are equal up to the rounding of their number format."""
    bound = 4 * torch.finfo(x.dtype).eps * y.float().abs()
    return bool(((x.float() - y.float()).abs() <= bound).all())
