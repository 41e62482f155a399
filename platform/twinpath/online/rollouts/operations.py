"""What operators may do, by name: the one list behind the admin API and the command line."""

from collections.abc import Callable, Mapping
from typing import Any

from twinpath.errors import InputError, RolloutError, did_you_mean
from twinpath.online.rollouts.asked import StartRequest
from twinpath.online.rollouts.desk import Desk, shown
from twinpath.registry import changes
from twinpath.rollout.machine import Command

#: Operations that change nothing.
READS = ("show", "status", "history")
#: Operation → the command that it gives to the rollout under way.
COMMANDS = {
    "pause": Command.PAUSE,
    "resume": Command.RESUME,
    "promote": Command.PROMOTE,
    "rollback": Command.ROLL_BACK,
    "abort": Command.ABORT,
}


class Operations:
    """Runs operations on one desk. Answers are of JSON types."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._by_name: dict[str, Callable[[str, Mapping[str, Any]], dict[str, Any]]] = {
            "start": self._start,
            "status": lambda model, _: self._desk.status(model),
            "history": lambda model, _: {"model": model, "history": self._desk.history(model)},
        }
        for name, command in COMMANDS.items():
            self._by_name[name] = self._giving(command)
        self._by_name |= {
            "show": lambda model, _: changes.described(self._desk.registry, model),
            "model_promote": self._promote_model,
            "model_rollback": self._roll_back_model,
            "model_pin": self._pin,
        }

    def run(self, operation: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Do it. ``arguments`` has ``model``, ``by`` (who asks), and what the operation reads.

        Raises InputError for an operation that there is not, and what the desk raises.
        """
        found = self._by_name.get(operation)
        if found is None:
            raise InputError(f"no operation {operation!r}.{did_you_mean(operation, self._by_name)}")
        return found(str(arguments["model"]), arguments)

    def _start(self, model: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        asked = StartRequest.read(arguments.get("rollout", {}))
        state = self._desk.start(model, asked, str(arguments.get("by", "")))
        return {"model": model, "rollout": shown(state)}

    def _promote_model(self, model: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        self._refuse_during_rollout(model)
        version, alias = _version(arguments), str(arguments.get("alias", "champion"))
        changes.promote(self._desk.registry, model, version, alias)
        return changes.described(self._desk.registry, model)

    def _roll_back_model(self, model: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        self._refuse_during_rollout(model)
        changes.roll_back(self._desk.registry, model)
        return changes.described(self._desk.registry, model)

    def _pin(self, model: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        keep = bool(arguments.get("keep", True))
        changes.pin(self._desk.registry, model, _version(arguments), keep)
        return changes.described(self._desk.registry, model)

    def _refuse_during_rollout(self, model: str) -> None:
        _, state = self._desk.read(model)
        if state is not None and state.live:
            raise RolloutError(
                f"rollout {state.id!r} of {model!r} is under way: promote or abort that first"
            )

    def _giving(self, command: Command) -> Callable[[str, Mapping[str, Any]], dict[str, Any]]:
        def run(model: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
            by, reason = str(arguments.get("by", "")), str(arguments.get("reason", ""))
            return {
                "model": model,
                "rollout": shown(self._desk.command(model, command, by, reason)),
            }

        return run


def _version(arguments: Mapping[str, Any]) -> str:
    version = str(arguments.get("version", ""))
    if not version.isdigit():
        raise InputError(f'version {version!r}: expected the number of a version, such as "3"')
    return version
