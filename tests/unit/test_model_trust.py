"""What may run code, and who vouches for it; nothing malicious ever runs."""

from pathlib import Path

import pytest

pytest.importorskip("yaml")

from twinpath.errors import ArtifactError, ConfigError, UntrustedModelError
from twinpath.registry.manifest import read_manifest
from twinpath.registry.trust import Format, Trust, format_of

DIGEST = "sha256:" + "ab" * 32


def written(folder: Path, text: str, **files: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "MLmodel").write_text(text)
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def stored(folder: Path, text: str, **files: bytes) -> Format:
    return format_of(read_manifest(written(folder, text, **files)))


ZIP = b"PK\x03\x04 and so on"
SKOPS = "flavors: {sklearn: {pickled_model: model.skops, serialization_format: skops}}"


@pytest.mark.parametrize(
    ("text", "files"),
    [
        (SKOPS, {"model_dot_skops": ZIP}),
        ("flavors: {xgboost: {data: m.json}}", {}),
        ("flavors: {xgboost: {data: m.ubj}}", {}),
        ("flavors: {lightgbm: {data: m.lgb}}", {}),
        ("flavors: {lightgbm: {data: m.skops}}", {"m_dot_skops": ZIP}),
        ("flavors: {onnx: {data: m.onnx}}", {}),
        ("flavors: {twinpath_torch: {data: w.safetensors}}", {}),
        ("flavors: {transformers: {task: x}}", {"model__model_dot_safetensors": b"x"}),
    ],
)
def test_data_needs_no_trust(tmp_path: Path, text: str, files: dict[str, bytes]):
    found = stored(tmp_path, text, **files)
    assert not found.runs_code
    Trust().check(found, DIGEST, ["anywhere"])


@pytest.mark.parametrize(
    ("text", "files"),
    [
        ("flavors: {sklearn: {pickled_model: m.pkl, serialization_format: cloudpickle}}", {}),
        ("flavors: {sklearn: {pickled_model: m.pkl}}", {}),
        (SKOPS, {"model_dot_skops": b"\x80\x04 a pickle with another name"}),
        ("flavors: {xgboost: {data: m.pkl}}", {}),
        ("flavors: {lightgbm: {data: m.joblib}}", {}),
        ("flavors: {lightgbm: {data: m.skops}}", {"m_dot_skops": b"\x80\x04"}),
        ("flavors: {onnx: {data: m.pkl}}", {}),
        ("flavors: {pytorch: {model_data: data}}", {"data__model_dot_pth": b"x"}),
        ("flavors: {pytorch: {model_data: data}}", {"data__model_dot_pt2": ZIP}),
        ("flavors: {transformers: {task: x}}", {"model__pytorch_model_dot_bin": b"x"}),
        ("flavors: {python_function: {loader_module: mlflow.pyfunc.model}}", {}),
        ("flavors: {something_new: {}}", {}),
        ("flavors: {}", {}),
    ],
)
def test_code_is_refused_unless_source_or_bytes_are_trusted(
    tmp_path: Path, text: str, files: dict[str, bytes]
):
    found = stored(tmp_path, text, **files)
    assert found.runs_code
    with pytest.raises(UntrustedModelError, match=DIGEST):
        Trust.of(["s3://ours/*"]).check(found, DIGEST, ["s3://theirs/m"])
    Trust.of(["s3://ours/*"]).check(found, DIGEST, ["s3://ours/m"])
    Trust.of(["s3://ours/*"]).check(found, DIGEST, ["models:/m-1", "s3://ours/m"])
    Trust.of([DIGEST]).check(found, DIGEST, ["s3://theirs/m"])


def test_a_pinned_digest_vouches_for_no_other_bytes():
    assert not Trust.of([DIGEST]).vouches("sha256:" + "cd" * 32, ["x"])


def test_an_empty_source_is_never_trusted():
    assert not Trust.of(["*"]).vouches(DIGEST, [""])


def test_a_digest_that_is_none_is_refused_when_it_is_written():
    with pytest.raises(ConfigError, match="64 digits"):
        Trust.of(["sha256:abc"])


def test_files_outside_of_a_version_are_out_of_reach(tmp_path: Path):
    folder = written(tmp_path / "m", "flavors: {onnx: {data: ../secret.onnx}}")
    (tmp_path / "secret.onnx").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="outside"):
        read_manifest(folder).file("../secret.onnx")


@pytest.mark.parametrize("text", ["", "just text", "flavors: 3", "!!python/object:os.system {}"])
def test_an_mlmodel_file_that_is_none_is_an_error_of_ours(tmp_path: Path, text: str):
    with pytest.raises(ArtifactError, match="MLmodel cannot be read"):
        read_manifest(written(tmp_path, text))
