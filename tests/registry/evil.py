"""Pickles that would write a file if they were ever loaded."""

import pickle
from pathlib import Path
from typing import Any


class Evil:
    """Runs code when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self._proof = str(proof)

    def __reduce__(self) -> Any:
        return Path.write_text, (Path(self._proof), "it ran")


def bomb(proof: Path) -> bytes:
    """A pickle that leaves a proof."""
    return pickle.dumps(Evil(proof))
