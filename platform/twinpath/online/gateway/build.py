"""From the settings to the list of rules, and what may not be served without them."""

import ipaddress

from twinpath.errors import ConfigError
from twinpath.online.gateway.args import GatewayArgs, LimitArgs
from twinpath.online.gateway.audit import AuditLog
from twinpath.online.gateway.authentication import Authentication, Authenticator
from twinpath.online.gateway.keys import ApiKeys
from twinpath.online.gateway.limiting import Limit, SharedLimit
from twinpath.online.gateway.rules import Gateway, Rule
from twinpath.online.gateway.spending import SharedTokenLimit, TokenLimit
from twinpath.online.gateway.tokens import Tokens
from twinpath.online.gateway.wishes import Deadlines, MaxRows, Priorities


def build(args: GatewayArgs, graph: str) -> Gateway:
    """The gateway of a graph. Raises ConfigError for files that cannot be read."""
    rules: list[Rule] = []
    authenticators: list[Authenticator] = []
    given = args.limits or LimitArgs()

    def limit(text: str, quota: bool, name: str) -> Rule:
        if given.redis_url is not None:
            return SharedLimit(text, given.redis_url, graph, quota=quota, name=name)
        return Limit(text, quota=quota, replicas=given.replicas)

    if args.api_keys is not None:
        authenticators.append(ApiKeys(args.api_keys, lambda text, quota: limit(text, quota, "own")))
    if args.jwt is not None:
        authenticators.append(Tokens(args.jwt))
    if authenticators:
        rules.append(Authentication(authenticators))
    if given.rate is not None:
        rules.append(limit(given.rate, False, "limit"))
    if given.quota is not None:
        rules.append(limit(given.quota, True, "limit"))
    if given.tokens is not None:
        if given.redis_url is not None:
            rules.append(SharedTokenLimit(given.tokens, given.redis_url, graph))
        else:
            rules.append(TokenLimit(given.tokens, replicas=given.replicas))
    rules.append(Deadlines())
    if args.priorities:
        rules.append(Priorities())
    if args.max_rows is not None:
        rules.append(MaxRows(args.max_rows))
    if args.audit_log is not None:
        path = None if args.audit_log == "-" else args.audit_log
        rules.append(AuditLog(path, graph))
    return Gateway(rules, tell_limits=given.headers)


def refuse_public(host: str, args: GatewayArgs) -> None:
    """Raises ConfigError if a graph would be open to everybody who can reach this machine."""
    if args.authenticates or args.allow_unauthenticated or _is_loopback(host):
        return
    raise ConfigError(
        f"{host} can be reached from other machines, and the graph's gateway asks nobody who they "
        "are: give args.gateway.api_keys (twinpath keys new FILE) or args.gateway.jwt, or set "
        "args.gateway.allow_unauthenticated: true if something in front of it does"
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
