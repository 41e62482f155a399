"""The command line: ``twinpath explain graphs.flights:graph``."""

from twinpath.cli.main import app, main

__all__ = ["app", "main"]
