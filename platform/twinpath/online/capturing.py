"""Switches the capturing of feature lookups on, in whatever process they run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twinpath.nodes.features import FeatureLookup
from twinpath.observe.capture import Recorder
from twinpath.online.feature_args import CaptureArgs


def capture(nodes: Mapping[str, Any], args: CaptureArgs | None, graph: str) -> list[Recorder]:
    """A recorder for each lookup among loaded nodes (by name), writing below
    ``<folder>/<graph>/<node>``; close them at the end."""
    recorders = []
    for name, node in nodes.items():
        if args is None or not isinstance(node, FeatureLookup):
            continue
        about = {
            "graph": graph,
            "node": name,
            "service": node.service,
            "repo": _folder(node.repo),
            "on_missing": node.on_missing,
            "defaults": node.defaults,
            "full_names": node.full_names,
        }
        folder = args.folder / graph / name
        recorder = Recorder(folder, about, max_bytes=args.max_bytes, share=args.share)
        node.watch = recorder.record
        recorders.append(recorder)
    return recorders


def _folder(repo: Any) -> str | None:
    """Where a repository lies, if it is a folder."""
    given = getattr(repo, "given", repo)
    return str(Path(given).absolute()) if isinstance(given, (str, Path)) else None
