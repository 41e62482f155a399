"""The arguments of a served graph: a pydantic model made for it, in which typos are refused."""

from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
    create_model,
)

from twinpath.graph.placement import Batch, Placement, Replicas
from twinpath.graph.plan import Plan
from twinpath.online.feature_args import FeatureArgs
from twinpath.online.gateway.args import GatewayArgs
from twinpath.online.rollouts.args import RolloutArgs
from twinpath.online.strict import Strict, refuse_unknown


class NodeArgs(Strict):
    """Placement of one node; a key that is given, and not null, replaces what the graph says."""

    num_cpus: float | None = Field(None, ge=0)
    num_gpus: float | None = Field(None, ge=0)
    resources: dict[str, float] | None = None
    replicas: Replicas | None = None
    batch: Batch | None = None

    def over(self, placement: Placement | None) -> Placement:
        """The placement with these keys replaced."""
        keys = [key for key in NodeArgs.model_fields if key in self.model_fields_set]
        given = {key: value for key in keys if (value := getattr(self, key)) is not None}
        return (placement or Placement()).model_copy(update=given)


class IngressArgs(NodeArgs):
    """The ingress, which runs all fused nodes. Sizes of queues are in rows, of bodies in bytes;
    rows that wait longer than ``queue_timeout_s`` seconds are given up with 504, and a body that
    is not whole after ``body_timeout_s`` seconds with 408."""

    max_queue_rows: int = Field(16384, ge=1)
    queue_timeout_s: float = Field(60.0, gt=0)
    max_inflight: int | None = Field(None, ge=1)
    max_body_bytes: int = Field(8 * 1024 * 1024, ge=1)
    body_timeout_s: float = Field(60.0, gt=0)
    offload_after_ms: float = Field(10.0, ge=0)


class GraphArgs(Strict):
    """Base of the argument models of all graphs. ``version`` is what clients see as the model's."""

    ingress: IngressArgs = IngressArgs()
    gateway: GatewayArgs = GatewayArgs()
    features: FeatureArgs = FeatureArgs()
    rollouts: RolloutArgs = RolloutArgs()
    version: str = Field("1", pattern=r"^[\w.\-]+$")
    nodes: dict[str, NodeArgs | None] = {}


def args_model(plan: Plan) -> type[GraphArgs]:
    """The argument model of a graph: ``ingress``, and ``nodes`` with a key for each node."""
    names = [step.name for step in plan.steps if step.node is not None]

    def known(given: Any) -> Any:
        refuse_unknown(given, names)
        return given

    nodes = Annotated[dict[str, NodeArgs | None], BeforeValidator(known)]
    return create_model("Args", __base__=GraphArgs, nodes=(nodes, {}))


def place(plan: Plan, args: GraphArgs) -> Plan:
    """The plan with the placements that the arguments ask for."""
    by_name = {step.name: step.placement for step in plan.steps}
    given = {name: value for name, value in args.nodes.items() if value is not None}
    nodes = {name: value.over(by_name[name]) for name, value in given.items()}
    return plan.with_placements(nodes, args.ingress.over(plan.placement))
