"""TLS in front of Serve: an own HAProxy, from the package that Serve runs its HAProxy from.

Serve 2.60 writes its HAProxy's configuration itself and has no place for certificates in it, so
this one stands before it, on the public address, and Serve stays on the loopback. It also bounds
how long a request's headers may take, and tells the server who asked (X-Forwarded-For), and that
a client hung up.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from twinpath.errors import ConfigError, MissingExtraError
from twinpath.online.haproxy import bundled

_CONFIG = """\
global
    maxconn 8192
    ssl-default-bind-options ssl-min-ver TLSv1.2
defaults
    timeout connect 5s
    timeout client 90s
    timeout server 3600s
    timeout http-request 10s
    timeout http-keep-alive 90s
    option abortonclose
    option http-no-delay
    http-reuse always
frontend https
    mode http
    bind {listen} ssl crt {pem}{verify} alpn h2,http/1.1
    option forwardfor
    http-request set-header X-Forwarded-Proto https
    default_backend serve
backend serve
    mode http
    server serve {to}
"""
_GRPC = """\
frontend grpc
    mode http
    bind {listen} ssl crt {pem}{verify} alpn h2
    option forwardfor
    default_backend serve_grpc
backend serve_grpc
    mode http
    server serve {to} proto h2
"""


@dataclass(frozen=True)
class Edge:
    """What listens where, with which certificates. Addresses are ``HOST:PORT``."""

    listen: str
    to: str
    certificate: Path
    key: Path
    client_ca: Path | None = None
    grpc_listen: str | None = None
    grpc_to: str = "127.0.0.1:9000"


def write_config(edge: Edge, folder: Path) -> Path:
    """HAProxy's configuration and the PEM that it reads, in a folder of the caller's own.

    Raises ConfigError for a file or address that cannot be used.
    """
    texts = []
    for path in (edge.certificate, edge.key, *([edge.client_ca] if edge.client_ca else [])):
        try:
            texts.append(path.read_text())
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error}") from None
    for address in (edge.listen, edge.to, edge.grpc_listen or edge.to, edge.grpc_to):
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or any(c.isspace() for c in address):
            raise ConfigError(f"address {address!r}: expected HOST:PORT, such as 0.0.0.0:8443")
    pem = folder / "server.pem"
    descriptor = os.open(pem, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as sink:
        sink.write(texts[0].rstrip() + "\n" + texts[1])
    verify = ""
    if edge.client_ca is not None:
        authority = folder / "clients.pem"
        authority.write_text(texts[2])
        verify = f" ca-file {authority} verify required"
    text = _CONFIG.format(listen=edge.listen, to=edge.to, pem=pem, verify=verify)
    if edge.grpc_listen is not None:
        text += _GRPC.format(listen=edge.grpc_listen, to=edge.grpc_to, pem=pem, verify=verify)
    config = folder / "edge.cfg"
    config.write_text(text)
    return config


def binary() -> Path:
    """The HAProxy that ``ray[serve]`` installs. Raises MissingExtraError."""
    if (found := bundled()) is None:
        raise MissingExtraError("ray[serve]", "online")
    return found


def run_edge(edge: Edge) -> None:
    """Become HAProxy in the foreground; does not return."""
    config = write_config(edge, Path(tempfile.mkdtemp(prefix="twinpath-edge-")))
    program = binary()
    os.execv(program, [str(program), "-W", "-db", "-f", str(config)])
