"""The identity of the run's stream: the corpus, hooks and dtype that all of its producers must agree on.

The first producer's HELLO is the stream for as long as a session has it. The first activations that arrive settle it
for the run, restarts included.
"""

from __future__ import annotations

from typing import Any

from producer.wire import Hello, Hook, Reject

STREAM_FACTS = ("fingerprint", "shards", "held_out", "context", "hooks", "dtype")
"""Fields of HELLO that every producer of a run must agree on."""
MAX_REASON = 900
"""Characters of a refusal's differences; the wire has a limit, and the first ones say most."""

Fact = tuple[str, Any, Any]
"""A name, the run's value and a producer's."""


class StreamIdentity:
    """The run's stream, and the comparison of others with it."""

    def __init__(self, expected: dict[str, Any], fixed_chunks: bool) -> None:
        """`expected`: facts from the trainer's run file; `fixed_chunks`: producers must agree on the size of chunks."""
        self.hello: Hello | None = None
        self.is_settled = False
        """Activations of it have arrived: it is the run's for good."""
        self.norm_bounds: list[float] | None = None
        """For each hook, the norm beyond which every producer drops an activation."""
        self._expected = expected
        self._fixed_chunks = fixed_chunks

    def adopt(self, hello: Hello) -> None:
        """Makes a producer's stream the run's."""
        self.hello, self.norm_bounds = hello, hello.norm_bounds

    def is_new(self, hello: Hello) -> bool:
        """Whether there is no stream yet, or another one."""
        return self.hello is None or bool(_differences(self._stream_facts(hello)))

    def mismatch(self, hello: Hello, has_sessions: bool) -> Reject | None:
        """The refusal of a producer of another stream; None when it may serve this one."""
        from_file, from_stream = _differences(self._file_facts(hello)), _differences(self._stream_facts(hello))
        if not from_file and not (from_stream and (self.is_settled or has_sessions)):
            return None
        differences = "; ".join((from_file | from_stream).values())
        if len(differences) > MAX_REASON:
            differences = f"{differences[:MAX_REASON]} …"
        if from_file or self.is_settled:
            advice, retry = "Start it with the run's own file, or start a new run directory", False
        else:
            advice, retry = "No activation was received so far: the first ones decide", True
        return Reject(code="mismatch", reason=f"{differences}. {advice}", retry=retry)

    def _file_facts(self, hello: Hello) -> list[Fact]:
        """The facts of the trainer's own run file beside those of a producer."""
        theirs = {fact: getattr(hello, fact) for fact in STREAM_FACTS} | {
            "hooks": [hook.name for hook in hello.hooks],
            "deterministic": hello.provenance.get("deterministic", False),
        }
        return [(name, ours, theirs[name]) for name, ours in self._expected.items()]

    def _stream_facts(self, hello: Hello) -> list[Fact]:
        """The facts of the run's stream beside those of a producer."""
        if self.hello is None:
            return []
        names = [name for name in STREAM_FACTS if name != "fingerprint"]
        facts = [(name, _fact(self.hello, name), _fact(hello, name)) for name in names]
        if self._fixed_chunks:
            facts.append(("activations per chunk", self.hello.chunk_rows, hello.chunk_rows))
        if self.hello.fingerprint != hello.fingerprint:
            facts += _fingerprint_facts(self.hello, hello)
        return facts


def _fact(hello: Hello, name: str) -> Any:
    """A field of HELLO. Streams of 0.1.0 name the module alone where its input is hooked."""
    if name != "hooks":
        return getattr(hello, name)
    return [hook.model_copy(update={"module": hook.module.removesuffix(":input")}) for hook in hello.hooks]


def _fingerprint_facts(ours: Hello, theirs: Hello) -> list[Fact]:
    """The facts behind two fingerprints; the fingerprints themselves when the facts do not differ."""
    names = sorted({*ours.provenance, *theirs.provenance})
    facts = [(name, ours.provenance.get(name), theirs.provenance.get(name)) for name in names]
    different = [fact for fact in facts if fact[1] != fact[2]]
    return different or [("fingerprint", ours.fingerprint, theirs.fingerprint)]


def _differences(facts: list[Fact]) -> dict[str, str]:
    """A sentence for each fact in which the two sides differ, with both values; each fact once."""
    sentences: dict[str, str] = {}
    for name, ours, theirs in facts:
        if ours != theirs:
            sentence = f"{name} differs: this run streams {_as_text(ours)}, the producer {_as_text(theirs)}"
            sentences.setdefault(name, sentence)
    return sentences


def _as_text(fact: Any) -> str:
    if isinstance(fact, list):
        return ", ".join(_as_text(item) for item in fact)
    return f"{fact.name} ({fact.module}, width {fact.width})" if isinstance(fact, Hook) else str(fact)
