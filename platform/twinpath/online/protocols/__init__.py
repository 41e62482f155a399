"""Protocols: codecs that translate between the wire and columns, and nothing else."""
