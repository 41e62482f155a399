"""A version that is wrong in any way takes no traffic: what served goes on, and the reason is said
in the node's status and in the registry."""

import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from evil import bomb
from mlflow.models import Model, infer_signature
from registered_models import (
    COLUMNS,
    FLAVORS,
    FRAME,
    QUICK,
    SIGNATURE,
    Shelf,
    X,
    Y,
    columns,
    constant,
    golden,
    raw_pickle,
    skops,
    trained,
)

from twinpath import RegistryModel
from twinpath.errors import UntrustedModelError
from twinpath.registry.reference import REFUSED_TAG
from twinpath.registry.slots import Slots

pytestmark = pytest.mark.timeout(300)


class Bed:
    """A node that serves a good version of a model, and the shelf to put worse ones on."""

    def __init__(self, name: str, shelf: Shelf, tmp_path: Path, **more: Any) -> None:
        self.name, self.shelf, self.tmp_path = name, shelf, tmp_path
        self.good = shelf.register(name, skops(tmp_path / "good", constant(0.25)), "champion")
        inputs = dict.fromkeys("abc", "float64")
        self.node = RegistryModel(name, tracking_uri=shelf.uri, inputs=inputs, poll_s=0.1, **more)
        self.node.setup()

    @property
    def slots(self) -> Slots:
        return self.node._slots

    def offer(self, files: Path) -> tuple[str, str]:
        """Register files, let the alias name them, and wait; code and reason if it was refused."""
        version = self.shelf.register(self.name, files, "champion")
        self.node._watcher.read()
        assert self.slots.wait(100)
        refused = self.slots.refusal(version)
        return refused or ("", "")

    def still_good(self) -> None:
        """The good version serves, and the registry says why the other does not."""
        assert self.slots.serving == self.good
        np.testing.assert_allclose(self.node.predict(columns(4))["score"], 0.25)


@pytest.fixture
def bed(on_file: Shelf, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Bed]:
    made = Bed(request.node.name[:60].replace("[", "-").replace("]", ""), on_file, tmp_path)
    yield made
    made.node.teardown()


def _wrong_signature(path: Path) -> Path:
    frame = pd.DataFrame(X, columns=["a", "b", "distance"])
    return skops(path, trained(), signature=infer_signature(frame, np.zeros(400)),
                 input_example=None)  # fmt: skip


def _wrong_types(path: Path) -> Path:
    frame = FRAME.assign(c="text")
    return skops(path, trained(), signature=infer_signature(frame, np.zeros(400)),
                 input_example=None)  # fmt: skip


def _load_error(path: Path) -> Path:
    skops(path)
    (path / "model.skops").write_bytes(b"PK\x03\x04 not a zip after all")
    return path


def _cut_short(path: Path) -> Path:
    skops(path)
    content = (path / "model.skops").read_bytes()
    (path / "model.skops").write_bytes(content[: len(content) // 2])
    return path


def _nan(path: Path) -> Path:
    model = constant(0.5)
    model.intercept_[:] = np.nan
    return skops(path, model)


def _wrong_answers(path: Path) -> Path:
    return golden(skops(path, constant(0.75)), 0.25)


def _ten_times_slower(path: Path) -> Path:
    """Neighbours among 800,000 rows, each of which is looked at."""
    from sklearn.neighbors import KNeighborsClassifier

    model = KNeighborsClassifier(3, algorithm="brute")
    return skops(path, model.fit(np.tile(X, (2000, 1)), np.tile(Y, 2000)))


def _no_mlmodel(path: Path) -> Path:
    path.mkdir()
    (path / "readme.txt").write_text("nothing here")
    return path


def _cannot_answer(path: Path) -> Path:
    from sklearn.linear_model import LogisticRegression

    return skops(path, LogisticRegression().fit(X[:, :2], Y))


BAD: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "wrong signature": (_wrong_signature, "signature", "'distance'"),
    "wrong types": (_wrong_types, "signature", "'c' as str, which is given as float64"),
    "load error": (_load_error, "model_load", "no skops file"),
    "cut short": (_cut_short, "model_load", "no skops file"),
    "NaN": (_nan, "model_check", "not finite"),
    "wrong answers": (_wrong_answers, "model_check", "golden row 0: 'score' is 0.75"),
    "ten times slower": (_ten_times_slower, "model_check", "times as long as what serves now"),
    "no model": (_no_mlmodel, "artifact", "no MLmodel file"),
    "cannot answer": (_cannot_answer, "model_check", "cannot answer"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_version_never_serves_and_is_named(bed: Bed, kind: str, tmp_path: Path):
    make, code, text = BAD[kind]
    found_code, reason = bed.offer(make(tmp_path / "bad"))
    assert (found_code, text in reason) == (code, True), reason
    bed.still_good()
    [told] = [note for note in bed.node.notes() if "is refused" in note]
    assert reason in told
    version = bed.slots.status()[-1]["version"]
    bed.slots._jobs.put(lambda: None)
    tag = _tag(bed, version)
    assert tag.startswith(f"{code}: ")


def _tag(bed: Bed, version: str) -> str:
    """The tag is written by the loading thread, behind the refusal."""
    import time

    for _ in range(300):
        found = bed.shelf.tag(bed.name, version, REFUSED_TAG)
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError("the registry was not told")


def test_a_bad_version_does_not_hinder_the_next_good_one(bed: Bed, tmp_path: Path):
    assert bed.offer(_nan(tmp_path / "bad"))[0] == "model_check"
    assert bed.offer(skops(tmp_path / "next", constant(0.5))) == ("", "")
    np.testing.assert_allclose(bed.node.predict(columns(4))["score"], 0.5)


def _evil_sklearn(path: Path, proof: Path) -> Path:
    return raw_pickle(path, bomb(proof))


def _evil_skops_name(path: Path, proof: Path) -> Path:
    skops(path)
    (path / "model.skops").write_bytes(bomb(proof))
    return path


def _evil_skops_type(path: Path, proof: Path) -> Path:
    """A skops file that would call a function, with a list beside it that says it may."""
    skops(path)
    schema = {
        "__class__": "system", "__module__": "os", "__loader__": "FunctionNode", "__id__": 1,
        "content": "os.system", "protocol": 2, "_skops_version": "0.16.0",
    }  # fmt: skip
    with zipfile.ZipFile(path / "model.skops", "w") as archive:
        archive.writestr("schema.json", json.dumps(schema))
    text = (path / "MLmodel").read_text()
    text = text.replace("skops_trusted_types: null", "skops_trusted_types: [os.system]")
    (path / "MLmodel").write_text(text)
    return path


def _evil_xgboost(path: Path, proof: Path) -> Path:
    return raw_pickle(path, bomb(proof), "xgboost")


def _evil_lightgbm(path: Path, proof: Path) -> Path:
    return raw_pickle(path, bomb(proof), "lightgbm")


def _evil_onnx(path: Path, proof: Path) -> Path:
    path.mkdir()
    (path / "model.onnx").write_bytes(bomb(proof))
    return _described(path, "onnx", data="model.onnx")


def _evil_torch(path: Path, proof: Path) -> Path:
    (path / "data").mkdir(parents=True)
    (path / "data" / "model.pth").write_bytes(bomb(proof))
    return _described(path, "pytorch", model_data="data")


def _evil_exported(path: Path, proof: Path) -> Path:
    """torch.export unpickles what stands for the sample inputs."""
    (path / "data").mkdir(parents=True)
    with zipfile.ZipFile(path / "data" / "model.pt2", "w") as archive:
        archive.writestr("model/data/sample_inputs/model.pt", bomb(proof))
        archive.writestr("model/archive_format", "pt2")
    return _described(path, "pytorch", model_data="data")


def _evil_weights(path: Path, proof: Path) -> Path:
    path.mkdir()
    (path / "weights.safetensors").write_bytes(bomb(proof))
    return _described(path, "twinpath_torch", data="weights.safetensors")


def _evil_transformers(path: Path, proof: Path) -> Path:
    files, _, _ = FLAVORS["transformers"](path)
    (files / "model" / "pytorch_model.bin").write_bytes(bomb(proof))
    return files


def _evil_pyfunc(path: Path, proof: Path) -> Path:
    FLAVORS["pyfunc"](path)
    (path / "python_model.pkl").write_bytes(bomb(proof))
    return path


def _evil_code(path: Path, proof: Path) -> Path:
    """A pyfunc whose loader is a file beside it."""
    (path / "code").mkdir(parents=True)
    (path / "code" / "loader.py").write_text(f"open({str(proof)!r}, 'w').write('it ran')\n")
    return _described(path, "python_function", loader_module="loader", code="code")


def _described(path: Path, flavor: str, **options: Any) -> Path:
    model = Model(signature=SIGNATURE)
    model.add_flavor(flavor, **options)
    model.save(str(path / "MLmodel"))
    return path


EVIL: dict[str, Callable[[Path, Path], Path]] = {
    "sklearn": _evil_sklearn,
    "a pickle called skops": _evil_skops_name,
    "skops with a list of its own": _evil_skops_type,
    "xgboost": _evil_xgboost,
    "lightgbm": _evil_lightgbm,
    "onnx": _evil_onnx,
    "torch": _evil_torch,
    "torch.export": _evil_exported,
    "safetensors": _evil_weights,
    "transformers": _evil_transformers,
    "pyfunc": _evil_pyfunc,
    "code beside a pyfunc": _evil_code,
}


@pytest.fixture(scope="module")
def guarded(on_file: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    """One node for all malicious versions, with everything that a loader may ask for."""
    folder = tmp_path_factory.mktemp("guarded")
    made = Bed(
        "guarded", on_file, folder,
        architecture="registered_models:network", cache_dir=str(folder / "cache"),
    )  # fmt: skip
    yield made
    made.node.teardown()


@pytest.mark.parametrize("kind", EVIL)
def test_nothing_of_a_malicious_version_is_ever_run(guarded: Bed, kind: str, tmp_path: Path):
    proof = tmp_path / "proof"
    code, reason = guarded.offer(EVIL[kind](tmp_path / "evil", proof))
    assert code in ("untrusted_model", "model_load"), reason
    if kind not in ("onnx", "safetensors"):  # these are read as data, and are none
        assert code == UntrustedModelError.code, reason
    assert not proof.exists(), "code of an untrusted version ran"
    guarded.still_good()


def test_the_same_pickle_runs_where_its_source_is_trusted(on_file: Shelf, tmp_path: Path):
    """So the tests above could fail."""
    proof = tmp_path / "proof"
    bed = Bed("trusting", on_file, tmp_path, trusted=["*"])
    try:
        bed.offer(_evil_sklearn(tmp_path / "evil", proof))
        assert proof.exists()
        bed.still_good()  # what it built is no model
    finally:
        bed.node.teardown()


class Hog:
    """Asks for far more memory than there is when it is unpickled."""

    def __reduce__(self) -> Any:
        return np.ones, (1 << 42,)


class Greedy:
    """Takes more and more memory, piece by piece."""

    def __reduce__(self) -> Any:
        return _fill, ()


def _fill() -> Any:
    return [np.ones(16 << 20, np.uint8) for _ in range(1000)]


class Quits:
    """Ends the process that unpickles it."""

    def __reduce__(self) -> Any:
        import os

        return os._exit, (3,)


@pytest.fixture(scope="module")
def bounded(on_file: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    """A node with a small budget that trusts everybody."""
    folder = tmp_path_factory.mktemp("bounded")
    made = Bed(
        "bounded", on_file, folder, trusted=["*"], memory_bytes=256 << 20,
        cache_dir=str(folder / "cache"),
    )  # fmt: skip
    yield made
    made.node.teardown()


@pytest.mark.parametrize(
    ("thing", "code", "text"),
    [
        (Hog(), "memory_budget", "asked for more memory"),
        (Greedy(), "memory_budget", "asked for more memory"),
        (Quits(), "model_load", "ended with status 3"),
    ],
    ids=["at once", "bit by bit", "exits"],
)
def test_a_version_that_takes_too_much_or_ends_the_process_only_ends_its_trial(
    bounded: Bed, thing: Any, code: str, text: str, tmp_path: Path
):
    found, reason = bounded.offer(raw_pickle(tmp_path / "bad", thing))
    assert (found, text in reason) == (code, True), reason
    bounded.still_good()


def test_a_version_that_is_too_big_is_refused_before_it_is_loaded(bounded: Bed, tmp_path: Path):
    files = skops(tmp_path / "big")
    with (files / "more.bin").open("wb") as file:
        file.truncate(200 << 20)
    code, reason = bounded.offer(files)
    assert code == "memory_budget"
    assert "needs about 0.39 GiB" in reason
    assert "the budget is 0.25 GiB" in reason
    bounded.still_good()


def test_names_of_the_models_columns_are_as_they_are_made():
    assert tuple(FRAME.columns) == COLUMNS
    assert QUICK
