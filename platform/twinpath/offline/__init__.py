"""The offline runtime: a plan on Ray Data."""

from twinpath.offline.job import Job, Summary

__all__ = ["Job", "Summary"]
