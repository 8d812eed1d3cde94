"""The SAEs of a run, and an operator's requests: plain data, and part of every checkpoint.

The run file names the SAEs that a run begins with. `ctl` attaches others and detaches any while the run trains; the
roster keeps that, and has precedence over the file when the run is resumed. Light: settings only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from producer.common.shell import shell_command
from producer.common.toml import show_value
from trainer.saes.settings import SaeSettings
from trainer.settings import TrainerSettings
from trainer.state.format import MemberState, RosterState


class RosterError(ValueError):
    """An SAE cannot join, or a run file is not the run's. The message says what to change."""


@dataclass
class Member:
    """One SAE of the run."""

    settings: SaeSettings
    number: int
    """Number of SAEs that had joined before it: its first weights are drawn from the run's seed and this."""
    joined_at: int = 0
    """Tokens that the run had trained on when it joined."""
    attached: bool = False
    """It joined through `ctl`; the run file need not name it."""
    leaving: bool = False
    """An operator has detached it: it leaves the run when it is finished."""
    ended: bool = False
    """It is finished, and a snapshot of its last weights was published."""

    @property
    def name(self) -> str:
        return self.settings.name


@dataclass
class Roster:
    """See the module's docstring."""

    members: list[Member]
    joined: int
    """Number of SAEs that have ever joined."""
    gone: list[str] = field(default_factory=list)
    """Names of SAEs that have left. No other may have them: snapshots and metrics of two SAEs would mix."""
    paused: bool = False
    threads: int | None = None
    """CPU threads of one SAE's arithmetic, fixed when the run begins: with another number sums round differently, and
    an SAE that joins must not change the others by a bit."""
    forgotten_hooks: list[str] = field(default_factory=list)
    """Hooks whose last SAE has left; they are streamed no more, and no other SAE can join there."""

    @classmethod
    def of(cls, saes: Sequence[SaeSettings]) -> Roster:
        """The roster of a new run."""
        return cls([Member(sae, number) for number, sae in enumerate(saes)], len(saes))

    @property
    def settings(self) -> list[SaeSettings]:
        return [member.settings for member in self.members]

    def resolve(self, settings: TrainerSettings) -> TrainerSettings:
        """The settings of the run file, with the SAEs of this moment."""
        return settings.model_copy(update={"sae": self.settings})

    @property
    def is_finished(self) -> bool:
        """Every SAE is finished, and its last snapshot published."""
        return all(member.ended for member in self.members)

    def find(self, name: str) -> Member:
        """The member of that name. Raises RosterError when there is none."""
        for member in self.members:
            if member.name == name:
                return member
        raise RosterError(
            f"there is no SAE {show_value(name)}; those of this run are {', '.join(m.name for m in self.members)}"
        )

    def join(self, sae: SaeSettings, joined_at: int) -> Member:
        """Adds a member. Raises RosterError when its name, or that of its EMA copy, was ever used in the run."""
        used_names = {*self.gone, *(name for member in self.members for name in _names(member.settings))}
        if clash := sorted(used_names & set(_names(sae))):
            raise RosterError(
                f"the name {', '.join(clash)} is taken in this run, by an SAE that lives or by one that has left: "
                "choose another, so that snapshots and metrics do not mix"
            )
        member = Member(sae, self.joined, joined_at, attached=True)
        self.members.append(member)
        self.joined += 1
        return member

    def leave(self, member: Member, keep_name: bool) -> None:
        """Removes a member; `keep_name`: nobody may take its name, since snapshots and metrics have it."""
        self.members.remove(member)
        self.gone += _names(member.settings) if keep_name else []

    def state(self) -> RosterState:
        """A copy of the roster, for `restore_roster`."""
        members = [
            MemberState(
                settings=member.settings.model_dump(mode="json", exclude_none=True),
                number=member.number,
                joined_at=member.joined_at,
                attached=member.attached,
                leaving=member.leaving,
                ended=member.ended,
            )
            for member in self.members
        ]
        return RosterState(members, self.joined, list(self.gone), self.paused, self.threads, list(self.forgotten_hooks))


def restore_roster(state: RosterState, saes: Sequence[SaeSettings], directory: Path) -> Roster:
    """The roster of a checkpoint, with what may change of the settings taken from the run file's `saes`.

    Raises RosterError when the file names other SAEs than the run has. It need not name those that were attached, and
    may go on naming those that were detached.
    """
    members = [
        Member(**vars(member) | {"settings": SaeSettings.model_validate(member.settings)}) for member in state.members
    ]
    roster = Roster(members, state.joined, list(state.gone), state.paused, state.threads, list(state.forgotten_hooks))
    ours = {sae.name: sae.shape() for sae in saes if sae.name not in roster.gone}
    theirs = {member.name: member.settings.shape() for member in members if not member.attached or member.name in ours}
    if ours != theirs:
        raise RosterError(
            f"the run file and the checkpoint of {directory} disagree: {'; '.join(_differences(ours, theirs))}. "
            "Restore the file, or start a new run directory. SAEs join and leave a run while it goes on: "
            f"`{shell_command('trainer', 'ctl', '--help')}`"
        )
    for sae in saes:
        if sae.name in ours:
            member = roster.find(sae.name)
            # A budget that was raised brings a finished SAE back to work.
            member.ended &= sae.tokens == member.settings.tokens
            member.settings = sae
    names = [name for member in members for name in _names(member.settings)]
    if clash := sorted({name for name in names if names.count(name) > 1}):
        raise RosterError(f"{', '.join(clash)} would be the name of an SAE and of an EMA copy: remove ema_tokens")
    return roster


def _differences(ours: dict[str, dict[str, Any]], theirs: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Sentences on what differs between the `shape` of SAEs in the run file and in the checkpoint."""
    for name in sorted(ours.keys() | theirs.keys()):
        sae = f"sae {show_value(name)}"
        if name not in theirs or name not in ours:
            yield f"{sae} is in {'the checkpoint' if name in theirs else 'the run file'} alone"
            continue
        for key in {**ours[name], **theirs[name]}:
            here, there = (
                show_value(shape[key]) if key in shape else "not set" for shape in (ours[name], theirs[name])
            )
            if here != there:
                yield f"{sae}: {key} is {here} in the run file and {there} in the checkpoint"


def _names(sae: SaeSettings) -> list[str]:
    """The names of an SAE in snapshots."""
    return [sae.name, f"{sae.name}-ema"] if sae.ema_tokens else [sae.name]
