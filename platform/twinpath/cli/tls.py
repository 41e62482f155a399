"""``twinpath dev-cert`` and ``twinpath edge``: TLS in front of a served graph."""

from pathlib import Path
from typing import Annotated

import typer


def dev_cert(
    folder: Annotated[Path, typer.Argument(help="where the files go")],
    host: Annotated[list[str] | None, typer.Option(help="a name or address of the server")] = None,
) -> None:
    """Make a certificate authority, a server's and a client's certificate, for development."""
    from twinpath.online.gateway.tls import make_certificates

    for path in make_certificates(folder, host or ["localhost", "127.0.0.1"]):
        typer.echo(str(path))


def edge(
    certificate: Annotated[Path, typer.Option(help="PEM of the server's certificate chain")],
    key: Annotated[Path, typer.Option(help="PEM of its key")],
    listen: Annotated[str, typer.Option(help="ADDRESS:PORT for HTTPS")] = "0.0.0.0:8443",
    to: Annotated[str, typer.Option(help="where Serve listens")] = "127.0.0.1:8000",
    grpc_listen: Annotated[str | None, typer.Option(help="ADDRESS:PORT for gRPC over TLS")] = None,
    grpc_to: Annotated[str, typer.Option(help="where Serve's gRPC listens")] = "127.0.0.1:9000",
    client_ca: Annotated[
        Path | None, typer.Option(help="PEM of who signs clients' certificates; makes them needed")
    ] = None,
) -> None:
    """Terminate TLS (and mutual TLS) in front of Serve, with the HAProxy that Serve ships."""
    from twinpath.online.gateway.edge import Edge, run_edge

    run_edge(Edge(listen, to, certificate, key, client_ca, grpc_listen, grpc_to))
