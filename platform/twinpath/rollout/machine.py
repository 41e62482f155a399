"""The rollout as a state machine: (state, event) → (state, instructions). Pure.

shadow → canary steps → promoted; or rolled back or aborted from anywhere. The controller carries
instructions out in order. Each is idempotent, so one that failed is tried again, and after a crash
between any two the saved state leads to the same end: an end is first saved as decided
(``ending``), then acted on, then saved as done. :class:`Recovered` yields what is still to do.
"""

import enum
from dataclasses import dataclass
from typing import Any

from twinpath.errors import ConfigError
from twinpath.rollout.audit import line_of
from twinpath.rollout.state import Ending, Kind, RolloutState, Status
from twinpath.rollout.verdict import Action, Verdict


class Command(enum.StrEnum):
    """What an operator may ask for. ``promote`` ends a rollout at once, in the challenger's
    favour; ``roll_back`` refuses the challenger, ``abort`` says nothing against it."""

    PAUSE = "pause"
    RESUME = "resume"
    PROMOTE = "promote"
    ROLL_BACK = "roll_back"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class Operator:
    """An operator's command; ``by`` and ``reason`` go to the audit log."""

    command: Command
    now_s: float
    by: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Judged:
    """The guard's verdict on the state's step."""

    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Recovered:
    """A controller started and read this state; the one before may have died anywhere."""

    now_s: float


Event = Operator | Judged | Recovered


@dataclass(frozen=True, slots=True)
class Save:
    """Instruction: write the state to the model's tag. Replicas follow it within seconds."""

    state: RolloutState


@dataclass(frozen=True, slots=True)
class SetAlias:
    """Instruction: let the alias name this version."""

    model: str
    alias: str
    version: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """Instruction: write the reason to the version's tag ``twinpath.refused``."""

    model: str
    version: str
    reason: str


@dataclass(frozen=True, slots=True)
class Audit:
    """Instruction: append this line to the audit log, unless one with its ``id`` is there."""

    line: dict[str, Any]


Instruction = Save | SetAlias | Refuse | Audit


@dataclass(frozen=True, slots=True)
class Transition:
    """The state once all instructions are carried out, and the instructions, in order."""

    state: RolloutState
    instructions: tuple[Instruction, ...] = ()


_ENDS = {
    Ending.PROMOTE: Status.PROMOTED,
    Ending.ROLL_BACK: Status.ROLLED_BACK,
    Ending.ABORT: Status.ABORTED,
}


def start(asked: RolloutState, now_s: float, by: str = "") -> Transition:
    """Begin a rollout from what was asked for: models, kind, steps, thresholds.

    Raises ConfigError for a state that has already begun to move.
    """
    if asked.status is not Status.RUNNING or asked.ending or asked.started_s:
        raise ConfigError(
            f"rollout {asked.id!r} has begun (status {asked.status}): start one with a new id"
        )
    first = -1 if asked.kind is Kind.CANARY and asked.shadow_first else 0
    state = _at_step(asked.but(started_s=now_s), first, now_s)
    return Transition(state, (Audit(line_of(state, "started", now_s, by=by)), Save(state)))


def advance(state: RolloutState, event: Event) -> Transition:
    """The next state and what is to be done. A rollout that is over stays as it is.

    Raises ConfigError for a command that the state does not allow.
    """
    if isinstance(event, Recovered):
        return _finish(state, event.now_s, "") if state.live and state.ending else Transition(state)
    if isinstance(event, Operator):
        return _commanded(state, event)
    verdict = event.verdict
    # A verdict on another step, or on another rollout, came too late to count.
    if not state.live or state.ending or (verdict.rollout, verdict.step) != (state.id, state.step):
        return Transition(state)
    if verdict.action is Action.ROLL_BACK:
        return _end(state, Ending.ROLL_BACK, verdict.reason, verdict.now_s, verdict=verdict)
    if verdict.action is Action.HOLD or state.status is Status.PAUSED:
        return Transition(state)
    if state.kind is not Kind.CANARY:
        return Transition(state)  # the share is the operator's to change
    if state.step == len(state.steps) - 1:
        return _end(state, Ending.PROMOTE, verdict.reason, verdict.now_s, verdict=verdict)
    moved = _at_step(state, state.step + 1, verdict.now_s)
    line = line_of(moved, "stepped", verdict.now_s, verdict=verdict)
    return Transition(moved, (Audit(line), Save(moved)))


def _commanded(state: RolloutState, event: Operator) -> Transition:
    command, reason = event.command, event.reason or f"{event.command} by {event.by or 'operator'}"
    if not state.live or state.ending:
        raise ConfigError(
            f"rollout {state.id!r} of {state.model!r} is over ({_how_over(state)}): "
            f"there is nothing to {command.replace('_', ' ')}"
        )
    if command in (Command.PAUSE, Command.RESUME):
        status = Status.PAUSED if command is Command.PAUSE else Status.RUNNING
        if status is state.status:
            return Transition(state)
        # Time in a pause is not time under watch: the step's begins again.
        started_s = event.now_s if status is Status.RUNNING else state.step_started_s
        moved = state.but(status=status, step_started_s=started_s, reason=reason)
        line = line_of(moved, f"{command}d", event.now_s, by=event.by)
        return Transition(moved, (Audit(line), Save(moved)))
    ending = {
        Command.PROMOTE: Ending.PROMOTE,
        Command.ROLL_BACK: Ending.ROLL_BACK,
        Command.ABORT: Ending.ABORT,
    }[command]
    return _end(state, ending, reason, event.now_s, by=event.by)


def _end(
    state: RolloutState,
    ending: Ending,
    reason: str,
    now_s: float,
    *,
    by: str = "",
    verdict: Verdict | None = None,
) -> Transition:
    """Save the decision, which already moves all traffic; act; save that it is done."""
    share = 1.0 if ending is Ending.PROMOTE else 0.0
    decided = state.but(
        ending=ending, share=share, mirror=0.0, status=Status.RUNNING, reason=reason[:1000]
    )
    line = line_of(decided, f"{ending}: decided", now_s, by=by, verdict=verdict)
    rest = _finish(decided, now_s, by)
    return Transition(rest.state, (Audit(line), Save(decided), *rest.instructions))


def _finish(decided: RolloutState, now_s: float, by: str) -> Transition:
    """From a saved decision to its end."""
    status = _ENDS[Ending(decided.ending or "")]
    winner = decided.challenger if status is Status.PROMOTED else decided.incumbent
    done = decided.but(status=status, ending=None, share=0.0)
    line = line_of(done, str(status), now_s, by=by)
    alias = SetAlias(decided.model, decided.alias, winner)
    refused = Refuse(decided.model, decided.challenger, decided.reason)
    acts = (refused, alias) if status is Status.ROLLED_BACK else (alias,)
    return Transition(done, (*acts, Audit(line), Save(done)))


def _at_step(state: RolloutState, step: int, now_s: float) -> RolloutState:
    if state.kind is Kind.SHADOW:
        share, mirror = 0.0, state.steps[step]
    elif step < 0:
        share, mirror = 0.0, state.shadow_first
    else:
        share, mirror = state.steps[step], 0.0
    return state.but(step=step, share=share, mirror=mirror, step_started_s=now_s)


def _how_over(state: RolloutState) -> str:
    return f"{state.ending} under way" if state.ending else str(state.status)
