"""One exception tree; each class carries a stable code and the HTTP status it maps to.

TwinpathError
├── GraphError                 invalid_graph       500  the wiring is wrong; raised while authoring
│   ├── CycleError             graph_cycle         500
│   ├── UnknownColumnError     unknown_column      500
│   ├── UnknownNodeError       unknown_node        500
│   └── DuplicateNameError     duplicate_name      500
├── ConfigError                invalid_config      500  a config value or key is wrong
│   └── MemoryPlanError        memory_plan         500  an engine does not fit into the memory
├── MissingExtraError          missing_extra       500  an optional dependency is not installed
├── InputError                 invalid_input       422  a row does not fit the input model
│   ├── EmptyBodyError         empty_body          400
│   ├── MalformedBodyError     malformed_body      400
│   ├── BodyTooLargeError      body_too_large      413
│   └── SlowBodyError          slow_body           408  the request's body did not come in time
├── UnknownModelError          unknown_model       404  no such model or version is served here
├── UnknownRequestError        unknown_request     404  no scores are kept for that request
├── AccessError                unauthenticated     401  no valid credentials; base of the next
│   └── ForbiddenError         forbidden           403  these credentials do not allow that
├── RowFailedError             row_failed          422  a node could not compute that row
├── NodeContractError          node_contract       500  a node broke its contract
├── RetryLaterError            retry_later         503  base of the next; ``retry_after_s``
│   ├── OverloadedError        overloaded          503  a bounded queue is full
│   ├── FeatureStoreError      feature_store       503  the feature store does not answer
│   └── LimitError             rate_limited        429  the client's own limit is reached
│       └── QuotaError         quota_exceeded      429  the client's quota is used up
├── DeadlineError              deadline_exceeded   504  the deadline passed before the answer
├── ClientClosedError      client_closed_request   499  the client hung up before its rows were run
├── RegistryError              registry            503  the model registry does not answer
├── ModelError                 model_refused       500  a registered version cannot be served
│   ├── ArtifactError          artifact            500  its files are missing, damaged or unreadable
│   ├── UntrustedModelError    untrusted_model     500  it would run code, and nobody vouched for it
│   ├── SignatureError         signature           500  its columns are not the node's
│   ├── ModelLoadError         model_load          500  loading it failed
│   ├── ModelCheckError        model_check         500  its answers are wrong or too slow
│   └── MemoryBudgetError      memory_budget       500  it does not fit the memory budget
├── RolloutError               rollout             409  a rollout does not allow what was asked for
└── BatchJobError              batch_job           500  a batch job could not run or finish
"""

import difflib
import math
from collections.abc import Iterable, Iterator
from typing import ClassVar


class TwinpathError(Exception):
    """Base of every error that Twinpath raises on purpose."""

    code: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class GraphError(TwinpathError):
    """The wiring of a graph is wrong."""

    code = "invalid_graph"


class CycleError(GraphError):
    """Nodes wait for each other."""

    code = "graph_cycle"


class UnknownColumnError(GraphError):
    """A node or condition names a column that nothing upstream produces."""

    code = "unknown_column"


class UnknownNodeError(GraphError):
    """A name refers to no node of the graph."""

    code = "unknown_node"


class DuplicateNameError(GraphError):
    """Two nodes of a graph, or two branches' columns, have the same name."""

    code = "duplicate_name"


class ConfigError(TwinpathError):
    """A configuration key or value is wrong."""

    code = "invalid_config"


class MemoryPlanError(ConfigError):
    """An engine needs more memory than there is."""

    code = "memory_plan"


class MissingExtraError(TwinpathError):
    """An optional dependency is not installed."""

    code = "missing_extra"

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"{package!r} is not installed, and this needs it: pip install 'twinpath[{extra}]'"
        )


class InputError(TwinpathError):
    """A row does not fit the graph's input model."""

    code = "invalid_input"
    http_status = 422


class EmptyBodyError(InputError):
    """The request has no body, or no rows."""

    code = "empty_body"
    http_status = 400


class MalformedBodyError(InputError):
    """The request's body is not what the endpoint reads."""

    code = "malformed_body"
    http_status = 400


class BodyTooLargeError(InputError):
    """The request's body is over the limit."""

    code = "body_too_large"
    http_status = 413


class SlowBodyError(InputError):
    """The request's body did not come to its end in time."""

    code = "slow_body"
    http_status = 408


class UnknownModelError(TwinpathError):
    """No model, or no version of it, has that name here."""

    code = "unknown_model"
    http_status = 404


class UnknownRequestError(TwinpathError):
    """No scores are kept for a request of that id."""

    code = "unknown_request"
    http_status = 404


class AccessError(TwinpathError):
    """The request carries no valid credentials."""

    code = "unauthenticated"
    http_status = 401


class ForbiddenError(AccessError):
    """The credentials are valid and do not allow this."""

    code = "forbidden"
    http_status = 403


class RowFailedError(TwinpathError):
    """A node could not compute one row."""

    code = "row_failed"
    http_status = 422


class NodeContractError(TwinpathError):
    """A node returned something that its contract does not allow."""

    code = "node_contract"


class RetryLaterError(TwinpathError):
    """Base of refusals that say after how many seconds another try makes sense."""

    code = "retry_later"
    http_status = 503

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    @property
    def retry_after(self) -> str:
        """The value of HTTP's ``Retry-After``: whole seconds, at least one."""
        return str(max(1, math.ceil(self.retry_after_s)))

    def __reduce__(self) -> tuple[type["RetryLaterError"], tuple[str, float]]:
        return type(self), (self.message, self.retry_after_s)


class OverloadedError(RetryLaterError):
    """A bounded queue is full."""

    code = "overloaded"


class FeatureStoreError(RetryLaterError):
    """The feature store does not answer."""

    code = "feature_store"


class LimitError(RetryLaterError):
    """The client's own rate limit is reached."""

    code = "rate_limited"
    http_status = 429


class QuotaError(LimitError):
    """The client's quota is used up."""

    code = "quota_exceeded"


class DeadlineError(TwinpathError):
    """The deadline passed before the answer was there."""

    code = "deadline_exceeded"
    http_status = 504


class ClientClosedError(TwinpathError):
    """The client hung up before its rows were run."""

    code = "client_closed_request"
    http_status = 499


class RegistryError(TwinpathError):
    """The model registry does not answer, or not in time."""

    code = "registry"
    http_status = 503


class ModelError(TwinpathError):
    """A registered version cannot be served; base of the reasons why."""

    code = "model_refused"


class ArtifactError(ModelError):
    """The files of a version are missing, damaged or not readable."""

    code = "artifact"


class UntrustedModelError(ModelError):
    """Loading a version would run code that nobody vouched for."""

    code = "untrusted_model"


class SignatureError(ModelError):
    """The columns that a version reads or returns are not those of its node."""

    code = "signature"


class ModelLoadError(ModelError):
    """Loading a version failed."""

    code = "model_load"


class ModelCheckError(ModelError):
    """The answers of a version are wrong, or come too slowly."""

    code = "model_check"


class MemoryBudgetError(ModelError):
    """A version does not fit the memory budget."""

    code = "memory_budget"


class RolloutError(TwinpathError):
    """A rollout, or the state that it is in, does not allow what was asked for."""

    code = "rollout"
    http_status = 409


class BatchJobError(TwinpathError):
    """A batch job could not run or finish."""

    code = "batch_job"


def _tree(root: type[TwinpathError]) -> Iterator[type[TwinpathError]]:
    yield root
    for child in root.__subclasses__():
        yield from _tree(child)


def error_of(code: str, message: str) -> TwinpathError:
    """An error of the tree above by its code; of the base for a code it does not have."""
    return next((cls for cls in _tree(TwinpathError) if cls.code == code), TwinpathError)(message)


def http_status_of(code: str) -> int:
    """The HTTP status for an error code of the tree above; 500 for a code it does not have."""
    return next((cls.http_status for cls in _tree(TwinpathError) if cls.code == code), 500)


#: HTTP status → name of the gRPC status code, for every status of the tree above.
GRPC_STATUS = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    408: "DEADLINE_EXCEEDED",
    409: "FAILED_PRECONDITION",
    413: "RESOURCE_EXHAUSTED",
    415: "INVALID_ARGUMENT",
    422: "INVALID_ARGUMENT",
    429: "RESOURCE_EXHAUSTED",
    499: "CANCELLED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` for the closest known name, else the list of what is known."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Known: {', '.join(map(repr, names)) or 'none'}."
