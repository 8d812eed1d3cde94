"""What a person may ask of a running trainer, carried out between two steps.

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
from trainer.control.ctl import Answer, Request, refusal
from trainer.phases import SaePhase
from trainer.report import SaeReport
from trainer.saes.settings import SaeSettings
from trainer.snapshot import SnapshotError, finite, snapshot_name
from trainer.training.loop import Loop
from trainer.training.roster import Member, RosterError
from trainer.training.run import Run

log = logging.getLogger("sluice.trainer")

MOST_NAMED = 20
"""Shards in trouble that a status names one by one."""


class CommandError(Exception):
    """A command that was not carried out. The message says what to change; `code` is the client's exit code."""

    def __init__(self, error: str, code: int = 2) -> None:
        super().__init__(error)
        self.code = code


def answer(loop: Loop, request: Request) -> None:
    """Carries a request out and answers it, whatever happens: the run must not end for a command."""
    try:
        if request.command not in COMMANDS:
            raise CommandError(f"there is no command {request.command!r}; there are {', '.join(COMMANDS)}")
        told = COMMANDS[request.command](loop, request.arguments)
        request.answer({"ok": True, **told})
        if request.command != "status":
            log.info("ctl %s: %s", request.command, told["said"])
    except (CommandError, RosterError, SettingsError, SnapshotError) as error:
        request.answer(refusal(str(error), getattr(error, "code", 2)))
    except Exception as error:
        log.exception("ctl %s failed", request.command)
        request.answer(refusal(f"{request.command} failed: {error!r}; the trainer's log has more", code=1))


# What is asked


def status(loop: Loop, _: dict[str, Any]) -> Answer:
    """The run, its stream and its SAEs, in numbers."""
    buffer, stream, run = loop.intake.buffer_report(), loop.intake.stream_report(), loop.run
    state = "paused" if loop.roster.paused else "waiting" if run is None else buffer.state
    return {
        "run": loop.intake.run_id,
        "state": state,
        "tokens": loop.tokens,
        "target_tokens": loop.settings.run.tokens,
        "tokens_per_second": round(loop.clock.rate(), 1) if run is not None else 0.0,
        "step": run.step if run is not None else 0,
        "producers": stream.producers,
        "epoch": stream.epoch,
        "buffer_rows": buffer.rows,
        "buffer_capacity_rows": buffer.capacity,
        **_trouble(loop),
        "saes": [_sae(loop, member) for member in loop.roster.members],
    }


def _trouble(loop: Loop) -> Answer:
    """Shards that are not trained on, and those on which producers are lost; the newest few by name."""
    quarantine, suspects = loop.intake.quarantine(), loop.intake.suspects()
    return {
        "quarantined": {
            "shards": len(quarantine.shards),
            "tokens": quarantine.tokens,
            "newest": [asdict(shard) for shard in quarantine.shards[-MOST_NAMED:]],
        },
        "suspects": [asdict(shard) for shard in suspects[-MOST_NAMED:]],
        "suspect_shards": len(suspects),
    }


def _sae(loop: Loop, member: Member) -> Answer:
    """One line of the table."""
    sae, run = member.settings, loop.run
    told: Answer = {
        "name": member.name,
        "architecture": sae.architecture,
        "hook": str(loop.settings.hooks_of(sae)),
        "d_sae": sae.d_sae,
        "attached": member.attached,
        "tokens": 0,
        "phase": "waiting",
        "rows_left": None,
    }
    numbers: dict[str, Any] = dict.fromkeys(("learning_rate", "fvu", "l0", "dead_latents", "dead_latents_ratio"))
    if run is None:
        return told | numbers
    sae_trainer = run.sae_trainer(member)
    told["tokens"] = sae_trainer.tokens
    told["phase"], told["rows_left"] = run.phase(member), sae_trainer.schedule.tokens_left(sae_trainer.tokens)
    if sae_trainer.tokens:
        assert run.scales is not None
        report: SaeReport = sae_trainer.report(run.scales)
        numbers = {name: finite(getattr(report, name)) for name in numbers}
    return told | numbers


def snapshot(loop: Loop, _: dict[str, Any]) -> Answer:
    """Publishes what the SAEs are at this moment."""
    run = _begun(loop)
    if not run.publishable or not loop.has_rows:
        raise CommandError("no rows are here to make a snapshot with; try again when a producer is at work", 1)
    loop.report()
    published = loop.publish()
    if not published:
        raise CommandError("the snapshot was not written; the trainer's log says why", 1)
    _keep(loop)  # a trainer that goes on from an older checkpoint takes later snapshots away
    path = f"{loop.settings.run.folder}/snapshots/{snapshot_name(loop.tokens)}"
    missing = [
        sae_trainer.settings.name for sae_trainer in run.publishable if sae_trainer.settings.name not in published
    ]
    without = f", without {', '.join(missing)}: the log says why" if missing else ""
    return {"said": f"published {path}{without}", "snapshot": path}


def cooldown(loop: Loop, given: dict[str, Any]) -> Answer:
    """Lets an SAE's learning rate fall to zero; it stays, finished."""
    run = _begun(loop)
    sae_trainer = run.sae_trainer(loop.roster.find(_text(given, "name")))
    name = sae_trainer.settings.name
    if sae_trainer.phase is SaePhase.FINISHED:
        return {"said": f"{name} is finished already", "rows_left": 0}
    if not sae_trainer.tokens:
        raise CommandError(f"{name} has learned nothing yet; `detach` takes it away")
    rows = sae_trainer.cool_down()
    _keep(loop)
    return {"said": f"{name} cools down over the next {rows:,} rows and is finished then", "rows_left": rows}


def attach(loop: Loop, given: dict[str, Any]) -> Answer:
    """A new SAE joins the stream; it learns from the next batch on."""
    run = _begun(loop)
    if loop.intake.is_winding_down:
        raise CommandError("the run is draining and leaves soon; start it again, then attach")
    table = given.get("sae")
    if not isinstance(table, dict):
        raise CommandError("attach needs the keys of an SAE")
    sae = settings_from(SaeSettings, table)
    if fault := loop.settings.hook_fault(sae):
        raise CommandError(f"sae {sae.name!r}: {fault}")
    try:
        sae_trainer = run.attach(sae, loop.tokens)
    except RuntimeError as error:  # torch's word for no memory
        raise CommandError(f"sae {sae.name!r} finds no room: {error}", 1) from None
    if run.scales is not None and loop.intake.filled(loop.settings.optimizer.batch):
        loop.initialise()
        if sae_trainer not in run.sae_trainers:
            raise CommandError(f"sae {sae.name!r} could not begin; the trainer's log says why", 1)
    loop.write_settings()
    _keep(loop)
    when = "learns from the next batch on" if sae_trainer.has_weights else "begins with the next rows"
    return {"said": f"{sae.name} has joined at {loop.tokens:,} tokens and {when}", "joined_at": loop.tokens}


def detach(loop: Loop, given: dict[str, Any]) -> Answer:
    """An SAE cools down, is published and leaves; `now` skips the cooldown."""
    run, now = _begun(loop), given.get("now", False)
    member = loop.roster.find(_text(given, "name"))
    if not isinstance(now, bool):
        raise CommandError("now must be true or false")
    if all(other.leaving for other in loop.roster.members if other is not member):
        raise CommandError(
            f"{member.name} is the last SAE of the run: attach another first, or end the run with "
            f"`cooldown {member.name}`"
        )
    sae_trainer = run.sae_trainer(member)
    if not sae_trainer.tokens:
        run.detach(member)
        loop.write_settings()
        _keep(loop)
        return {"said": f"{member.name} has left; it had learned nothing, so nothing is published", "rows_left": 0}
    member.leaving, member.ended = True, False
    rows = 0 if sae_trainer.phase is SaePhase.FINISHED else sae_trainer.cool_down(now)
    _keep(loop)
    how = f"cools down over the next {rows:,} rows, is published then and leaves" if rows else "is published and leaves"
    return {"said": f"{member.name} {how}", "rows_left": rows}


def pause(loop: Loop, _: dict[str, Any]) -> Answer:
    """No step until `resume`, restarts included."""
    if not loop.roster.paused:
        loop.report()
        loop.roster.paused = True
        _keep(loop)
        loop.report()
    return {"said": f"paused at {loop.tokens:,} tokens, until `resume`; producers wait"}


def resume(loop: Loop, _: dict[str, Any]) -> Answer:
    """Goes on after a pause."""
    if loop.roster.paused:
        loop.report()  # the time of the pause does not count
        loop.roster.paused = False
        _keep(loop)
    return {"said": f"training goes on at {loop.tokens:,} tokens"}


def retry_quarantined(loop: Loop, _: dict[str, Any]) -> Answer:
    """Shards that were quarantined are leased again, for the rows that they lack."""
    if loop.intake.is_winding_down:
        raise CommandError("the run is draining and leaves soon; start it again, then try")
    if not (count := loop.intake.retry_quarantined()):
        left = len(loop.intake.quarantine().shards)
        older = f"; an older release quarantined {left} shards, and kept nothing to try them again with" if left else ""
        return {"said": f"no shard can be tried again{older}", "shards": 0}
    _keep(loop)
    return {"said": f"{count} shards are leased again, for the rows that they lack", "shards": count}


def drain(loop: Loop, _: dict[str, Any]) -> Answer:
    """Nothing more is asked of producers; what is under way is trained, then the trainer leaves."""
    if loop.settings.run.deterministic:
        raise CommandError("a deterministic run cannot train on what happens to be under way: stop it with SIGTERM")
    if loop.roster.paused:
        raise CommandError("the run is paused: `resume` it first, or stop the trainer with SIGTERM")
    rows = loop.intake.wind_down()
    return {"said": f"draining: at most {rows:,} rows are trained yet, then the trainer leaves", "rows": rows}


COMMANDS: dict[str, Callable[[Loop, dict[str, Any]], Answer]] = {
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


def _begun(loop: Loop) -> Run:
    if loop.run is None:
        raise CommandError("no producer has come yet: change the run file instead, or start a producer first")
    return loop.run


def _text(given: dict[str, Any], key: str) -> str:
    if not isinstance(value := given.get(key), str):
        raise CommandError(f"{key} is missing, or no text")
    return value


def _keep(loop: Loop) -> None:
    """Writes the checkpoint that makes a command last."""
    if not loop.save():
        raise CommandError(
            "done, but not on disk: a trainer started again would not know of it. The log says what is wrong with the "
            "disk; the next checkpoint that can be written makes up for it", 1,
        )  # fmt: skip
