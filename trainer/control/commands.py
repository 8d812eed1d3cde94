"""The commands of an operator to a running trainer, carried out between two steps.

Each command is a function of the loop and the request's fields. It returns the answer, or raises CommandError and has
changed nothing. A change of the run is on disk before it is answered, so that it survives whatever comes next.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from producer.common.run_file import settings_from
from producer.common.toml import SettingsError
from trainer.control.requests import Answer, Request, refusal
from trainer.parallel.placement import sae_fault
from trainer.phases import SaePhase
from trainer.report import RanksReport, SaeReport
from trainer.saes.patterns import expand_sae, names_matching
from trainer.saes.settings import SaeSettings
from trainer.snapshot import SnapshotError, finite, snapshot_name
from trainer.training.loop import Loop
from trainer.training.roster import Member, RosterError
from trainer.training.run import Run

log = logging.getLogger("sluice.trainer")

Arguments = dict[str, Any]
"""Fields of a request besides its command."""

MAX_SHARDS_LISTED = 20
"""Shards in trouble that a status lists one by one."""


class CommandError(Exception):
    """A command that was not carried out. The message says what to change; `code` is the client's exit code."""

    def __init__(self, error: str, code: int = 2) -> None:
        super().__init__(error)
        self.code = code


def handle(loop: Loop, request: Request) -> None:
    """Carries a request out and answers it, whatever happens: the run must not end for a command."""
    try:
        if request.command not in COMMANDS:
            raise CommandError(f"there is no command {request.command!r}; there are {', '.join(COMMANDS)}")
        answer = COMMANDS[request.command](loop, request.arguments)
        request.answer({"ok": True, **answer})
        if request.command != "status":
            log.info("ctl %s: %s", request.command, answer["said"])
    except (CommandError, RosterError, SettingsError, SnapshotError) as error:
        request.answer(refusal(str(error), getattr(error, "code", 2)))
    except Exception as error:
        log.exception("ctl %s failed", request.command)
        request.answer(refusal(f"{request.command} failed: {error!r}; the trainer's log has more", code=1))


# The commands


def status(loop: Loop, _: Arguments) -> Answer:
    """The run, its stream and its SAEs, in numbers."""
    buffer, stream, run = loop.intake.buffer_report(), loop.intake.stream_report(), loop.run
    reports = {} if run is None else {report.name: report for report in run.reports()}
    ranks = RanksReport() if run is None else run.ranks_report()
    return {
        "run": loop.intake.run_id,
        "state": loop.phase,
        "tokens": loop.tokens,
        "target_tokens": loop.settings.run.tokens,
        "tokens_per_second": round(loop.rate, 1),
        "step": run.step if run is not None else 0,
        "producers": stream.producers,
        "epoch": stream.epoch,
        "buffer_rows": buffer.rows,
        "buffer_capacity_rows": buffer.capacity,
        **_shards_in_trouble(loop),
        "ranks": asdict(ranks),
        "saes": [_sae_status(loop, member, reports.get(member.name)) for member in loop.roster.members],
    }


def _shards_in_trouble(loop: Loop) -> Answer:
    """Quarantined shards, and those on which producers are lost; the newest few are listed."""
    quarantine, suspects = loop.intake.quarantine(), loop.intake.suspects()
    return {
        "quarantined": {
            "shards": len(quarantine.shards),
            "tokens": quarantine.tokens,
            "newest": [asdict(shard) for shard in quarantine.shards[-MAX_SHARDS_LISTED:]],
        },
        "suspects": [asdict(shard) for shard in suspects[-MAX_SHARDS_LISTED:]],
        "suspect_shards": len(suspects),
    }


def _sae_status(loop: Loop, member: Member, report: SaeReport | None) -> Answer:
    """One SAE: a row of the client's table."""
    sae, run = member.settings, loop.run
    sae_trainer = None if run is None else run.sae_trainer(member)
    answer: Answer = {
        "name": member.name,
        "architecture": sae.architecture,
        "hook": str(loop.settings.hooks_of(sae)),
        "d_sae": sae.d_sae,
        "attached": member.attached,
        "group": None if run is None else run.group_of(member.name),
        "tokens": 0 if sae_trainer is None else sae_trainer.tokens,
        "phase": SaePhase.JOINING if run is None else run.phase(member),
        "rows_left": None if sae_trainer is None else sae_trainer.schedule.tokens_left(sae_trainer.tokens),
    }
    names = ("learning_rate", "fvu", "l0", "dead_latents", "dead_latents_ratio")
    if report is None:
        return answer | dict.fromkeys(names)
    return answer | {name: finite(getattr(report, name)) for name in names}


def snapshot(loop: Loop, _: Arguments) -> Answer:
    """Publishes the SAEs as they are at this moment."""
    run = _require_run(loop)
    if not loop.can_publish:
        raise CommandError("no activations are here to make a snapshot with; try again when a producer is at work", 1)
    loop.report()
    published = loop.publish()
    if not published:
        raise CommandError("the snapshot was not written; the trainer's log says why", 1)
    _save(loop)  # a trainer that resumes from an older checkpoint moves later snapshots away
    path = f"{loop.settings.run.folder}/snapshots/{snapshot_name(loop.tokens)}"
    names = [sae_trainer.settings.name for sae_trainer in run.publishable]
    missing = [name for name in names if name not in published]
    without = f", without {', '.join(missing)}: the log says why" if missing else ""
    return {"said": f"published {path}{without}", "snapshot": path}


def cooldown(loop: Loop, arguments: Arguments) -> Answer:
    """Lets the learning rate of an SAE, or of all that a pattern names, fall to zero; they stay, finished."""
    run = _require_run(loop)
    members = _members(loop, arguments)
    if untrained := [member.name for member in members if not run.sae_trainer(member).tokens]:
        raise CommandError(f"{', '.join(untrained)} has learned nothing yet; `detach` takes it away")
    sentences: list[str] = []
    left: list[int] = []
    for member in members:
        if run.sae_trainer(member).phase is SaePhase.FINISHED:
            sentences.append(f"{member.name} is finished already")
            continue
        left.append(run.cool_down(member))
        sentences.append(f"{member.name} cools down over the next {left[-1]:,} tokens and is finished then")
    if left:
        _save(loop)
    return {"said": "; ".join(sentences), "rows_left": max(left, default=0)}


def attach(loop: Loop, arguments: Arguments) -> Answer:
    """Adds an SAE to the stream, or one for each layer of a pattern; they train from the next batch on."""
    run = _require_run(loop)
    if loop.intake.is_winding_down:
        raise CommandError("the run is draining and leaves soon; start it again, then attach")
    if not isinstance(table := arguments.get("sae"), dict):
        raise CommandError("attach needs the keys of an SAE")
    saes = [_checked_sae(loop, run, each) for each in expand_sae(table, loop.settings.hooks)]
    for sae in saes:
        try:
            run.attach(sae, loop.tokens)
        except RuntimeError as error:  # torch's type for no memory
            raise CommandError(f"sae {sae.name!r} finds no room: {error}", 1) from None
    names = [sae.name for sae in saes]
    if run.scales is not None and loop.intake.is_ready(loop.settings.optimizer.batch):
        loop.draw_weights(run)
        if lost := set(names) - {member.name for member in loop.roster.members}:
            raise CommandError(f"sae {', '.join(sorted(lost))} could not begin; the trainer's log says why", 1)
    loop.write_settings()
    _save(loop)
    has_weights = not {one.settings.name for one in run.lacking_weights} & set(names)
    verbs = ("has joined", "learns", "begins") if len(names) == 1 else ("have joined", "learn", "begin")
    when = f"{verbs[1]} from the next batch on" if has_weights else f"{verbs[2]} with the next activations"
    return {"said": f"{', '.join(names)} {verbs[0]} at {loop.tokens:,} tokens and {when}", "joined_at": loop.tokens}


def _checked_sae(loop: Loop, run: Run, table: Arguments) -> SaeSettings:
    """The settings of an SAE that may join."""
    sae = settings_from(SaeSettings, table)
    if fault := loop.settings.hook_fault(sae):
        raise CommandError(f"sae {sae.name!r}: {fault}")
    if forgotten := sorted(loop.settings.hooks_of(sae).names & set(loop.roster.forgotten_hooks)):
        raise CommandError(
            f"sae {sae.name!r}: {forgotten[0]} is streamed no more since the last SAE that read it has left: choose "
            "another hook, or train it in a new run"
        )
    if fault := sae_fault(sae, loop.settings.parallel, run.ranks.size):
        raise CommandError(fault)
    return sae


def detach(loop: Loop, arguments: Arguments) -> Answer:
    """Cools an SAE, or all that a pattern names, down, publishes and removes them; `now` skips the cooldown."""
    run, now = _require_run(loop), arguments.get("now", False)
    members = _members(loop, arguments)
    if not isinstance(now, bool):
        raise CommandError("now must be true or false")
    if all(other.leaving for other in loop.roster.members if other not in members):
        names = ", ".join(member.name for member in members)
        raise CommandError(
            f"{names} {'is' if len(members) == 1 else 'are'} the last SAE of the run: attach another first, or end the "
            f"run with `cooldown {arguments['name']}`"
        )
    answers = [_detach(run, member, now) for member in members]
    loop.write_settings()
    _save(loop)
    sentences, left = zip(*answers, strict=True)
    return {"said": "; ".join(sentences), "rows_left": max(left)}


def _detach(run: Run, member: Member, now: bool) -> tuple[str, int]:
    """(what happens to an SAE that leaves, tokens until then)"""
    sae_trainer = run.sae_trainer(member)
    if not sae_trainer.tokens:
        run.detach(member)
        return f"{member.name} has left; it had learned nothing, so nothing is published", 0
    member.leaving, member.ended = True, False
    tokens = 0 if sae_trainer.phase is SaePhase.FINISHED else run.cool_down(member, now)
    then = "is published and leaves"
    if tokens:
        then = f"cools down over the next {tokens:,} tokens, is published then and leaves"
    return f"{member.name} {then}", tokens


def _members(loop: Loop, arguments: Arguments) -> list[Member]:
    """The SAEs that `name` means, by their own name or by a pattern such as `mlp.*`."""
    pattern = _text(arguments, "name")
    names = names_matching(pattern, [member.name for member in loop.roster.members])
    if not names:
        known = ", ".join(member.name for member in loop.roster.members)
        raise CommandError(f"no SAE is named like {pattern!r}; those of this run are {known}")
    return [loop.roster.find(name) for name in names]


def pause(loop: Loop, _: Arguments) -> Answer:
    """Stops training until `resume`, restarts included."""
    if not loop.roster.paused:
        loop.report()
        loop.roster.paused = True
        _save(loop)
        loop.report()
    return {"said": f"paused at {loop.tokens:,} tokens, until `resume`; producers wait"}


def resume(loop: Loop, _: Arguments) -> Answer:
    """Continues after a pause."""
    if loop.roster.paused:
        loop.report()  # the time of the pause does not count
        loop.roster.paused = False
        _save(loop)
    return {"said": f"training goes on at {loop.tokens:,} tokens"}


def retry_quarantined(loop: Loop, _: Arguments) -> Answer:
    """Leases quarantined shards again, for the activations that they lack."""
    if loop.intake.is_winding_down:
        raise CommandError("the run is draining and leaves soon; start it again, then try")
    if not (count := loop.intake.retry_quarantined()):
        older = len(loop.intake.quarantine().shards)
        reason = f"; an older release quarantined {older} shards, and kept nothing to try them again with"
        return {"said": f"no shard can be tried again{reason if older else ''}", "shards": 0}
    _save(loop)
    return {"said": f"{count} shards are leased again, for the tokens that they lack", "shards": count}


def drain(loop: Loop, _: Arguments) -> Answer:
    """Asks producers for nothing more; what is on its way is trained, then the trainer leaves."""
    if loop.settings.run.deterministic:
        raise CommandError("a deterministic run cannot train on what happens to be under way: stop it with SIGTERM")
    if loop.roster.paused:
        raise CommandError("the run is paused: `resume` it first, or stop the trainer with SIGTERM")
    tokens = loop.intake.wind_down()
    return {"said": f"draining: at most {tokens:,} tokens are trained yet, then the trainer leaves", "rows": tokens}


COMMANDS: dict[str, Callable[[Loop, Arguments], Answer]] = {
    "status": status,
    "snapshot": snapshot,
    "cooldown": cooldown,
    "attach": attach,
    "detach": detach,
    "pause": pause,
    "resume": resume,
    "retry-quarantined": retry_quarantined,
    "drain": drain,
}


def _require_run(loop: Loop) -> Run:
    if loop.run is None:
        raise CommandError("no producer has come yet: change the run file instead, or start a producer first")
    return loop.run


def _text(arguments: Arguments, key: str) -> str:
    if not isinstance(value := arguments.get(key), str):
        raise CommandError(f"{key} is missing, or no text")
    return value


def _save(loop: Loop) -> None:
    """Writes the checkpoint with which a command outlasts a restart."""
    if not loop.save():
        raise CommandError(
            "done, but not on disk: a trainer started again would not know of it. The log says what is wrong with the "
            "disk; the next checkpoint that can be written makes up for it", 1,
        )  # fmt: skip
