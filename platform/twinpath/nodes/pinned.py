"""A plan in which a registry model is held at one version: for backtests and load tests."""

from dataclasses import replace

from twinpath.errors import ConfigError, did_you_mean
from twinpath.graph.plan import Plan, Step
from twinpath.nodes.registry import RegistryModel


def registry_step(plan: Plan, model: str | None = None) -> Step:
    """The step of a registered model, by its name; the only one when none is given.

    Raises ConfigError when there is none, or more than one to choose from.
    """
    steps = [step for step in plan.steps if isinstance(step.node, RegistryModel)]
    if not steps:
        raise ConfigError(f"graph {plan.graph_name!r} has no RegistryModel: nothing to compare")
    if model is None and len(steps) > 1:
        names = ", ".join(sorted(repr(step.node.name) for step in steps))
        raise ConfigError(f"graph {plan.graph_name!r} has several models: name one of {names}")
    for step in steps:
        if model is None or step.node.name == model:
            return step
    known = did_you_mean(str(model), [step.node.name for step in steps])
    raise ConfigError(f"graph {plan.graph_name!r} has no model {model!r}.{known}")


def pinned(plan: Plan, step: Step, version: str) -> Plan:
    """The plan with that step held at a version, and every node in one process."""
    steps = [
        replace(each, node=each.node.at(version)) if each.id == step.id else each
        for each in plan.steps
    ]
    one = replace(plan, steps=tuple(steps))
    return one.with_placements({each.name: None for each in steps if each.node is not None})
