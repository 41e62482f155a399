"""Carries out in the registry what the rollout's state machine says; nothing is kept here.

The controller and the command line both work through a desk. Every call reads the registry
afresh, and every write may be repeated, so a desk may die between any two of them.
"""

import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from twinpath.errors import ConfigError, RegistryError, RolloutError
from twinpath.online.rollouts import gates, journal
from twinpath.online.rollouts.asked import StartRequest
from twinpath.registry.changes import Shelf
from twinpath.registry.reference import PREVIOUS_TAG, ModelState, VersionInfo
from twinpath.rollout.audit import encode
from twinpath.rollout.machine import (
    Audit,
    Command,
    Event,
    Operator,
    Refuse,
    Save,
    SetAlias,
    Transition,
    advance,
    start,
)
from twinpath.rollout.state import REFUSED_TAG, TAG, RolloutState

_LOG = logging.getLogger(__name__)


class Files(Shelf, Protocol):
    """What a desk needs of `registry.client.Registry`."""

    def log_artifact(self, info: VersionInfo, file: Path, folder: str) -> None:
        """Keep a file beside the run that made a version."""


class Changed(RolloutError):
    """Somebody else changed the rollout in between: read it again."""


class Desk:
    """The rollouts of one registry. Calls block, and raise RegistryError when it is away.

    ``require`` is what rollouts need beside what the model's own tag asks for; ``audit_log`` a
    file for a copy of the lines.
    """

    def __init__(
        self,
        registry: Files,
        *,
        require: Sequence[str] = (),
        audit_log: Path | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.registry = registry
        self._require, self._audit_log, self._clock = tuple(require), audit_log, clock

    def read(self, model: str) -> tuple[ModelState, RolloutState | None]:
        """A model, and its rollout: the last one if it is over, None if there was none.

        Raises ConfigError for a tag that is no rollout.
        """
        found = self.registry.state(model)
        text = found.tags.get(TAG)
        return found, RolloutState.from_tag(text) if text else None

    def start(self, model: str, asked: StartRequest, by: str = "") -> RolloutState:
        """Begin a rollout. Raises RolloutError if one is under way, a report is missing, or the
        challenger was refused; UnknownModelError for a model or version that is not there."""
        found, before = self.read(model)
        if before is not None and before.live:
            raise RolloutError(
                f"rollout {before.id!r} of {model!r} is under way (version {before.challenger} at "
                f"{before.share:.0%}): abort it first"
            )
        incumbent = found.aliases.get(asked.alias)
        if incumbent is None:
            raise RolloutError(
                f"model {model!r} has no alias {asked.alias!r}, so nothing to compare with: "
                f"`twinpath models promote {model} VERSION` first"
            )
        challenger = self.registry.version(model, asked.challenger)
        refused = challenger.tags.get(REFUSED_TAG)
        if refused and not asked.again:
            raise RolloutError(
                f"version {asked.challenger} of {model!r} was refused: {refused}. Register a new "
                "one, or start it with `again` if the reason is gone"
            )
        if asked.challenger == incumbent:
            raise RolloutError(f"version {incumbent} of {model!r} serves already")
        needed = gates.required(found.tags, self._require)
        gates.check(needed, challenger.tags, model, incumbent, asked.challenger)
        now_s = self._clock()
        transition = start(asked.state(model, incumbent, now_s), now_s, by)
        if refused:
            self.registry.delete_tag(model, REFUSED_TAG, asked.challenger)
        self.carry_out(model, transition, found.tags.get(TAG))
        return transition.state

    def command(self, model: str, command: Command, by: str = "", reason: str = "") -> RolloutState:
        """Do what an operator says with the rollout under way. Raises RolloutError."""
        found, state = self.read(model)
        if state is None:
            raise RolloutError(f"model {model!r} has had no rollout: start one")
        return self.advance(
            model, found, state, Operator(command, self._clock(), by=by, reason=reason[:1000])
        )

    def advance(
        self, model: str, found: ModelState, state: RolloutState, event: Event
    ) -> RolloutState:
        """Let an event happen to the state that was read, and carry out what follows."""
        try:
            transition = advance(state, event)
        except ConfigError as error:
            raise RolloutError(error.message) from None
        self.carry_out(model, transition, found.tags.get(TAG))
        return transition.state

    def carry_out(self, model: str, transition: Transition, was: str | None) -> None:
        """Do the instructions in their order. ``was`` is the tag that they were decided on:
        raises Changed, before anything is saved, if it is another by now."""
        for instruction in transition.instructions:
            match instruction:
                case Save(state):
                    if self.registry.state(model).tags.get(TAG) != was:
                        raise Changed(f"the rollout of {model!r} was changed meanwhile: try again")
                    was = state.to_tag()
                    self.registry.set_tag(model, TAG, was)
                case SetAlias(name, alias, version):
                    before = self.registry.state(name).aliases.get(alias)
                    if before != version:
                        if before is not None:
                            self.registry.set_tag(name, PREVIOUS_TAG, before)
                        self.registry.set_alias(name, alias, version)
                case Refuse(name, version, reason):
                    self.registry.set_tag(name, REFUSED_TAG, reason, version)
                case Audit(line):
                    self._note(model, line)
        last = transition.state
        if transition.instructions and not last.live:
            self._file_history(last)

    def history(self, model: str) -> list[dict[str, Any]]:
        """The audit lines of all rollouts of a model, oldest first."""
        lines = [
            line
            for version in self.registry.versions(model)
            for line in journal.lines_of(version.tags)
        ]
        return sorted(lines, key=lambda line: str(line.get("time", "")))

    def status(self, model: str) -> dict[str, Any]:
        """A model and its rollout, in JSON types."""
        found, state = self.read(model)
        versions = self.registry.versions(model)
        return {
            "model": model,
            "aliases": dict(found.aliases),
            "require": list(gates.required(found.tags, self._require)),
            "rollout": shown(state),
            "versions": [
                {
                    "version": each.version,
                    "aliases": [a for a, v in found.aliases.items() if v == each.version],
                    "refused": each.tags.get(REFUSED_TAG),
                    "gates": {
                        kind: {"passed": gate.passed, "incumbent": gate.incumbent,
                               "reason": gate.reason, "report": gate.report}
                        for kind, gate in gates.gates_of(each.tags).items()
                    },
                }
                for each in versions
            ],
        }  # fmt: skip

    def keep_gate(self, model: str, version: str, gate: gates.Gate, files: Sequence[Path]) -> str:
        """Keep a report: its files beside the version's run, if it has one, and its verdict as
        the version's tag. Where the files went; "" if nowhere."""
        info = self.registry.version(model, version)
        kept = ""
        if info.run_id is not None:
            folder = f"{gate.kind}/{int(gate.time_s)}"
            for file in files:
                self.registry.log_artifact(info, file, folder)
            kept = f"runs:/{info.run_id}/{folder}"
        text = replace(gate, report=kept).to_tag()
        self.registry.set_tag(model, gates.GATE_TAG + gate.kind, text, version)
        return kept

    def _note(self, model: str, line: Mapping[str, Any]) -> None:
        version, key = str(line["challenger"]), journal.key_of(line)
        if key in self.registry.version(model, version).tags:
            return
        self.registry.set_tag(model, key, journal.text_of(line), version)
        if self._audit_log is not None:
            journal.append(self._audit_log, line)

    def _file_history(self, state: RolloutState) -> None:
        """The lines of a rollout that is over as one file beside its run; the tags have them
        already, so nothing depends on it."""
        try:
            info = self.registry.version(state.model, state.challenger)
            if info.run_id is None:
                return
            lines = [one for one in journal.lines_of(info.tags) if one.get("rollout") == state.id]
            with tempfile.TemporaryDirectory(prefix="twinpath-") as folder:
                file = Path(folder) / f"{state.id}.jsonl"
                file.write_text("".join(map(encode, lines)))
                self.registry.log_artifact(info, file, "rollouts")
        except RegistryError as error:
            _LOG.warning("the history of rollout %s was not filed: %s", state.id, error)


def shown(state: RolloutState | None) -> dict[str, Any] | None:
    """A rollout for people and programs: without what is only told to machines."""
    if state is None:
        return None
    return state.model_dump(mode="json", exclude={"bins", "version"}) | {
        "live": state.live,
        "versions": list(state.versions),
    }
