"""What a serve config says about the gateway, under ``args: gateway:``."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from twinpath.online.strict import Strict


def _limit(given: str) -> str:
    import limits

    if limits.parse(given).amount < 1:
        raise ValueError(f"limit {given!r} grants nothing: expected one such as '100/second'")
    return given


#: A number of requests in a time, such as ``100/second`` or ``50000/day``.
LimitText = Annotated[str, AfterValidator(_limit)]


class JwtArgs(Strict):
    """Tokens of an identity provider. One of ``jwks_file`` and ``jwks_url`` is needed; graphs that
    a token opens are named in its ``scope`` claim as ``<scope_prefix><graph>`` or ``...*``. No
    request with a token is more urgent than ``priority``. A token whose ``scope`` has
    ``admin_scope`` opens the admin API; None: no token does."""

    jwks_file: Path | None = None
    jwks_url: str | None = Field(None, pattern=r"^https?://")
    audience: str
    issuer: str | None = None
    algorithms: tuple[str, ...] = ("RS256", "ES256", "EdDSA")
    scope_prefix: str = "graph:"
    admin_scope: str | None = Field("admin", min_length=1)
    priority: Literal["low", "normal", "high"] = "normal"
    refresh_s: float = Field(300.0, gt=0)
    leeway_s: float = Field(10.0, ge=0)

    @field_validator("algorithms")
    @classmethod
    def _asymmetric(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        for name in given:
            if name.lower() == "none" or name.startswith("HS"):
                raise ValueError(f"algorithm {name!r}: only asymmetric ones, such as 'RS256'")
        return given

    @model_validator(mode="after")
    def _one_source(self) -> "JwtArgs":
        if (self.jwks_file is None) == (self.jwks_url is None):
            raise ValueError("give one of jwks_file and jwks_url")
        return self


class LimitArgs(Strict):
    """Limits of each principal (of each address where there is no authentication). In memory each
    replica has its part, 1/``replicas``; with ``redis_url`` all replicas share one count. With
    ``headers`` answers say what remains. ``tokens`` are those that language models read and
    write."""

    rate: LimitText | None = None
    quota: LimitText | None = None
    tokens: LimitText | None = None
    redis_url: str | None = Field(None, pattern=r"^rediss?://")
    replicas: int = Field(1, ge=1)
    headers: bool = True


class CorsArgs(Strict):
    """Browsers' cross-origin requests; see Starlette's CORSMiddleware."""

    allow_origins: tuple[str, ...] = ()
    allow_methods: tuple[str, ...] = ("GET", "POST")
    allow_headers: tuple[str, ...] = ("*",)
    #: Headers of answers that a page's scripts may read.
    expose_headers: tuple[str, ...] = (
        "x-request-id", "ratelimit", "ratelimit-policy", "retry-after",
        "server-timing", "inference-header-content-length",
    )  # fmt: skip
    allow_credentials: bool = False
    max_age_s: int = Field(600, ge=0)

    @model_validator(mode="after")
    def _no_credentials_for_all(self) -> "CorsArgs":
        if self.allow_credentials and "*" in self.allow_origins:
            raise ValueError("allow_credentials with any origin lets every site act as the user")
        return self


class GatewayArgs(Strict):
    """Rules that every request passes. All are off unless given.

    A public address without ``api_keys`` or ``jwt`` is refused unless ``allow_unauthenticated``.
    """

    api_keys: Path | None = None
    jwt: JwtArgs | None = None
    allow_unauthenticated: bool = False
    limits: LimitArgs | None = None
    max_rows: int | None = Field(None, ge=1)
    priorities: bool = True
    cors: CorsArgs | None = None
    #: A file that a line is appended to for each request; "-" is standard output.
    audit_log: Path | Literal["-"] | None = None

    @property
    def authenticates(self) -> bool:
        """Whether callers have to say who they are."""
        return self.api_keys is not None or self.jwt is not None
