"""Loaders: one module a flavor, each with ``load(manifest, options) -> Model``."""
