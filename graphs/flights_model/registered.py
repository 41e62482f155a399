"""The delay model in a registry of the example's own: ``<dir>/registry/mlflow.db``.

Training registers what it made and lets the alias ``champion`` name it; the graph serves whatever
that alias names.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from graphs.flights_model.nodes import FEATURE_TYPES, FEATURES, load_model
from twinpath import RegistryModel

MODEL = "flight-delay"
ALIAS = "champion"


def registry_uri(directory: Path) -> str:
    """The registry's address."""
    return f"sqlite:///{directory}/registry/mlflow.db"


def delay_model(directory: Path) -> RegistryModel:
    """The node: probability of an arrival over 15 minutes late, `p_delay`."""
    return RegistryModel(
        MODEL,
        alias=ALIAS,
        tracking_uri=registry_uri(directory),
        inputs=FEATURE_TYPES,
        outputs={"p_delay": "float64"},
        cache_dir=str(directory / "registry" / "cache"),
    )


def ensure_registered(directory: Path) -> str:
    """Register the trained model unless it is; its version."""
    trained = directory / "model" / "delay.joblib"
    known = directory / "registry" / "registered.json"
    digest = hashlib.sha256(trained.read_bytes()).hexdigest()
    versions: dict[str, str] = json.loads(known.read_text()) if known.is_file() else {}
    if digest not in versions:
        versions[digest] = _register(directory, load_model(trained))
        known.write_text(json.dumps(versions, indent=2) + "\n")
    return versions[digest]


def _register(directory: Path, model: Any) -> str:
    import mlflow.sklearn
    import numpy as np
    import pandas as pd
    import skops.io
    from mlflow import MlflowClient
    from mlflow.models import infer_signature

    from twinpath.registry.flavors.skops_files import ALLOWED

    folder = directory / "registry"
    folder.mkdir(exist_ok=True)
    files = folder / f"version-{len(list(folder.glob('version-*'))) + 1}"
    rows = pd.DataFrame(np.zeros((4, len(FEATURES))), columns=list(FEATURES))
    held = skops.io.get_untrusted_types(data=skops.io.dumps(model))
    mlflow.sklearn.save_model(
        model,
        files,
        signature=infer_signature(rows, np.zeros(4)),
        skops_trusted_types=sorted(ALLOWED.intersection(held)),
        pip_requirements=["scikit-learn", "skops"],
    )
    uri = registry_uri(directory)
    client = MlflowClient(uri, uri)
    if not client.search_registered_models(f"name='{MODEL}'"):
        client.create_registered_model(
            MODEL, description="Will a flight arrive more than 15 minutes late?"
        )
    made = client.create_model_version(MODEL, str(files))
    client.set_registered_model_alias(MODEL, ALIAS, made.version)
    return str(made.version)
