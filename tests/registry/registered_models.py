"""Real models of every flavor, small, and a registry's shelf to put them on."""

import json
import pickle
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow import MlflowClient
from mlflow.models import Model, infer_signature
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

COLUMNS = ("a", "b", "c")
_RNG = np.random.default_rng(7)
X = _RNG.normal(size=(400, 3))
Y = (X @ [1.0, -2.0, 0.5] + 0.1 * _RNG.normal(size=400) > 0).astype(int)
FRAME = pd.DataFrame(X, columns=list(COLUMNS))
SIGNATURE = infer_signature(FRAME, np.zeros(400))
#: MLflow would work these out by importing the model in a process of its own.
QUICK: dict[str, Any] = {"pip_requirements": ["mlflow"]}


def columns(n: int = 20) -> dict[str, NDArray[Any]]:
    """The first n rows as the columns that the nodes read."""
    return {name: X[:n, i].copy() for i, name in enumerate(COLUMNS)}


@dataclass
class Shelf:
    """A registry: register folders as versions, with artifacts kept where the registry says."""

    uri: str
    folder: Path
    client: MlflowClient = field(init=False)

    def __post_init__(self) -> None:
        self.client = MlflowClient(self.uri, self.uri)

    def register(self, name: str, model: Path, alias: str | None = None, **tags: str) -> str:
        """A new version of a model from its files; its number."""
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        if self.uri.startswith("http"):
            run = self.client.create_run("0")
            self.client.log_artifacts(run.info.run_id, str(model), "model")
            source, run_id = f"{run.info.artifact_uri}/model", run.info.run_id
        else:
            kept = self.folder / f"{name}-{len(list(self.folder.iterdir()))}"
            shutil.copytree(model, kept)
            source, run_id = str(kept), None
        made = self.client.create_model_version(name, source, run_id=run_id, tags=tags or None)
        if alias is not None:
            self.client.set_registered_model_alias(name, alias, made.version)
        return str(made.version)

    def alias(self, name: str, version: str, alias: str = "champion") -> None:
        """Let an alias name a version."""
        self.client.set_registered_model_alias(name, alias, version)

    def tag(self, name: str, version: str, key: str) -> str | None:
        """A version's tag."""
        return self.client.get_model_version(name, version).tags.get(key)


def trained(scale: float = 1.0) -> Any:
    """A classifier; another ``scale`` answers differently."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=scale))
    return model.fit(FRAME.to_numpy(), Y)


def constant(p: float) -> Any:
    """A classifier that answers this probability for every row."""
    model = LogisticRegression().fit(X, Y)
    model.coef_[:] = 0.0
    model.intercept_[:] = np.log(p / (1 - p))
    return model


def skops(path: Path, model: Any = None, **more: Any) -> Path:
    """scikit-learn in skops."""
    import mlflow.sklearn

    given = {"signature": SIGNATURE, "input_example": FRAME[:4]} | QUICK | more
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mlflow.sklearn.save_model(model if model is not None else trained(), path, **given)
    return path


def golden(path: Path, score: float, rows: int = 3) -> Path:
    """Golden rows beside a version: this score for each of the first rows."""
    inputs = {name: values.tolist() for name, values in columns(rows).items()}
    document = {"inputs": inputs, "outputs": {"score": [score] * rows}}
    (path / "golden.json").write_text(json.dumps(document))
    return path


def raw_pickle(path: Path, thing: Any, flavor: str = "sklearn") -> Path:
    """A version whose file is a plain pickle of ``thing``, whatever the flavor says it is."""
    path.mkdir(parents=True)
    model = Model(signature=SIGNATURE)
    name = {"sklearn": "model.pkl", "xgboost": "model.pkl", "lightgbm": "model.pkl"}[flavor]
    if flavor == "sklearn":
        model.add_flavor(flavor, pickled_model=name, serialization_format="cloudpickle")
    else:
        model.add_flavor(flavor, data=name)
    (path / name).write_bytes(thing if isinstance(thing, bytes) else pickle.dumps(thing))
    model.save(str(path / "MLmodel"))
    return path


Made = tuple[Path, NDArray[Any], dict[str, Any]]


def _sklearn(path: Path) -> Made:
    model = trained()
    return skops(path, model), model.predict_proba(X)[:, 1], {}


def _sklearn_pickle(path: Path) -> Made:
    model = trained()
    return skops(path, model, serialization_format="cloudpickle"), model.predict_proba(X)[:, 1], {
        "trusted": ["*"]
    }  # fmt: skip


def _xgboost(path: Path) -> Made:
    import mlflow.xgboost
    from xgboost import XGBClassifier

    model = XGBClassifier(n_estimators=8, max_depth=3, n_jobs=1).fit(X, Y)
    mlflow.xgboost.save_model(model, path, signature=SIGNATURE, model_format="json", **QUICK)
    return path, model.predict_proba(X)[:, 1], {}


def _lightgbm(path: Path) -> Made:
    import mlflow.lightgbm
    from lightgbm import LGBMClassifier

    model = LGBMClassifier(n_estimators=8, verbose=-1, n_jobs=1).fit(X, Y)
    mlflow.lightgbm.save_model(model.booster_, path, signature=SIGNATURE, **QUICK)
    return path, model.predict_proba(X)[:, 1], {}


def _lightgbm_skops(path: Path) -> Made:
    import mlflow.lightgbm
    from lightgbm import LGBMClassifier

    model = LGBMClassifier(n_estimators=8, verbose=-1, n_jobs=1).fit(X, Y)
    mlflow.lightgbm.save_model(model, path, signature=SIGNATURE, **QUICK)
    return path, model.predict_proba(X)[:, 1], {}


def _onnx(path: Path) -> Made:
    import mlflow.onnx
    from skl2onnx import to_onnx

    model = trained()
    exported = to_onnx(model, X[:2].astype(np.float32), options={"zipmap": False})
    mlflow.onnx.save_model(
        exported, path, signature=SIGNATURE, save_as_external_data=False, **QUICK
    )
    return path, model.predict_proba(X)[:, 1], {}


def network(seed: int = 0) -> Any:
    """A small torch module: (n, 3) → (n, 1)."""
    import torch

    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


def _answers(module: Any) -> NDArray[Any]:
    import torch

    with torch.inference_mode():
        found: NDArray[Any] = module(torch.from_numpy(X.astype(np.float32))).numpy()[:, 0]
    return found


def _tensor_signature() -> Any:
    return infer_signature(X.astype(np.float32), np.zeros((2, 1), np.float32))


_FLOATS = {"inputs": dict.fromkeys(COLUMNS, "float32")}


def _weights(path: Path) -> Made:
    from twinpath.registry.flavors.pytorch import save_weights

    module = network()
    save_weights(module, path, _tensor_signature(), X[:4].astype(np.float32))
    return path, _answers(module), _FLOATS | {"architecture": "registered_models:network"}


def _exported(path: Path) -> Made:
    import mlflow.pytorch

    module = network()
    mlflow.pytorch.save_model(
        module, path, signature=_tensor_signature(), input_example=X[:4].astype(np.float32),
        serialization_format="pt2", **QUICK,
    )  # fmt: skip
    return path, _answers(module), _FLOATS | {"trusted": ["*"]}


TEXTS = ["late again", "on time", "on", "late late"]


def _transformers(path: Path) -> Made:
    """A tiny BERT with random weights, and its words as tokens."""
    import mlflow.transformers
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    words = path.parent / "vocabulary.txt"
    words.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "late", "again", "on", "time"]))
    tokenizer = BertTokenizerFast(vocab_file=str(words), model_max_length=16)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=16, num_labels=2,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mlflow.transformers.save_model(
            {"model": model, "tokenizer": tokenizer}, str(path), task="text-classification",
            signature=infer_signature(pd.DataFrame({"text": TEXTS}), np.zeros(4)), **QUICK,
        )  # fmt: skip
    with torch.inference_mode():
        logits = model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits
    return path, logits.softmax(dim=-1).numpy()[:, 1], {"inputs": {"text": "str"}}


def _pyfunc(path: Path) -> Made:
    import mlflow.pyfunc

    class Twice(mlflow.pyfunc.PythonModel):
        def predict(self, context: Any, model_input: Any, params: Any = None) -> Any:
            return model_input["a"] * 2.0

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mlflow.pyfunc.save_model(path, python_model=Twice(), signature=SIGNATURE, **QUICK)
    return path, X[:, 0] * 2, {"trusted": ["*"]}


FLAVORS: dict[str, Callable[[Path], Made]] = {
    "sklearn-skops": _sklearn,
    "sklearn-pickle": _sklearn_pickle,
    "xgboost": _xgboost,
    "lightgbm": _lightgbm,
    "lightgbm-skops": _lightgbm_skops,
    "onnx": _onnx,
    "torch-safetensors": _weights,
    "torch-export": _exported,
    "transformers": _transformers,
    "pyfunc": _pyfunc,
}
