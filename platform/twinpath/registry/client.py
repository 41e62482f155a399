"""The registry's client: MLflow's, with a limit of time on every call and errors of our tree.

Calls block: from an event loop they belong in a thread (`asyncio.to_thread`). Works with a server
(``http://…``) and with a database file (``sqlite:///…``).
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import Any, TypeVar

from twinpath.errors import (
    ConfigError,
    MissingExtraError,
    RegistryError,
    TwinpathError,
    UnknownModelError,
    did_you_mean,
)
from twinpath.registry.reference import (
    DEFAULT_ALIAS,
    ModelReference,
    ModelState,
    VersionInfo,
)

T = TypeVar("T")
#: What the first call may take: behind it a database's schema is made or looked through.
_FIRST_S = 60.0
#: Where models are looked for when nothing is said; MLflow's own variable.
URI_VARIABLE = "MLFLOW_TRACKING_URI"


class Registry:
    """Reads and writes one MLflow registry.

    ``timeout_s`` bounds each call, retries included, but for the first (importing MLflow, which
    takes seconds, counts for none); downloads get ``download_timeout_s``. Every
    method raises RegistryError when the registry does not answer (in time), UnknownModelError for
    a model, alias or version that it does not have.
    """

    def __init__(
        self,
        tracking_uri: str | None = None,
        *,
        timeout_s: float = 5.0,
        download_timeout_s: float = 600.0,
    ) -> None:
        uri = tracking_uri or os.environ.get(URI_VARIABLE)
        if not uri:
            raise ConfigError(
                f"no registry is named: pass tracking_uri=, or set {URI_VARIABLE}, for example to "
                "sqlite:///mlflow.db or http://127.0.0.1:5000"
            )
        self.tracking_uri = uri
        self._timeout_s, self._download_timeout_s = timeout_s, download_timeout_s
        self._lock = threading.Lock()
        self._client: Any = None
        self._answered = False
        #: A call that hangs holds its thread; the next ones must not wait for it.
        self._threads = ThreadPoolExecutor(8, thread_name_prefix="twinpath-registry")

    def close(self) -> None:
        """Let the threads go. A call that hangs is not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def resolve(self, reference: ModelReference) -> VersionInfo:
        """The version that a reference names now."""
        if reference.version is not None:
            return self.version(reference.name, reference.version)
        alias = reference.alias or DEFAULT_ALIAS
        found = self._call(lambda c: c.get_model_version_by_alias(reference.name, alias), reference)
        return _info(found)

    def version(self, name: str, version: str) -> VersionInfo:
        """One version of a model."""
        reference = ModelReference(name, version=version)
        return _info(self._call(lambda c: c.get_model_version(name, version), reference))

    def versions(self, name: str) -> list[VersionInfo]:
        """All versions of a model, newest first."""
        state = self.state(name)
        quoted = name.replace("'", "''")
        found = self._call(lambda c: list(c.search_model_versions(f"name='{quoted}'")), name)
        by_version: dict[str, list[str]] = {}
        for alias, version in state.aliases.items():
            by_version.setdefault(version, []).append(alias)
        infos = [
            _info(each, tuple(sorted(by_version.get(str(each.version), ())))) for each in found
        ]
        return sorted(infos, key=lambda info: -int(info.version))

    def models(self) -> list[ModelState]:
        """All registered models, by name."""
        found = self._call(lambda c: list(c.search_registered_models(max_results=1000)), "all")
        return sorted((_state(each) for each in found), key=lambda state: state.name)

    def state(self, name: str) -> ModelState:
        """Tags and aliases of a model, in one call."""
        return _state(self._call(lambda c: c.get_registered_model(name), name))

    def tags(self, name: str) -> dict[str, str]:
        """Tags of a registered model."""
        return dict(self.state(name).tags)

    def set_tag(self, name: str, key: str, value: str, version: str | None = None) -> None:
        """Set a tag of a model, or of one of its versions."""
        if version is None:
            self._call(lambda c: c.set_registered_model_tag(name, key, value), name)
        else:
            self._call(lambda c: c.set_model_version_tag(name, version, key, value), name)

    def delete_tag(self, name: str, key: str, version: str | None = None) -> None:
        """Take a tag away; harmless when it is not there."""
        if version is None:
            if key in self.tags(name):
                self._call(lambda c: c.delete_registered_model_tag(name, key), name)
        elif key in self.version(name, version).tags:
            self._call(lambda c: c.delete_model_version_tag(name, version, key), name)

    def set_alias(self, name: str, alias: str, version: str) -> None:
        """Let an alias name this version."""
        self.version(name, version)  # MLflow takes versions that are not there
        self._call(lambda c: c.set_registered_model_alias(name, alias, version), name)

    def delete_alias(self, name: str, alias: str) -> None:
        """Take an alias away; harmless when it is not there."""
        self._call(lambda c: c.delete_registered_model_alias(name, alias), name)

    def location(self, info: VersionInfo) -> str:
        """The URI of the place where the registry keeps a version's files."""
        uri: str = self._call(
            lambda c: c.get_model_version_download_uri(info.name, info.version), info.name
        )
        return uri

    def download(self, info: VersionInfo, folder: Path) -> Path:
        """Copy a version's files below ``folder``, which must be empty; the directory with its
        MLmodel file. Raises RegistryError when the files cannot be had."""

        def fetch(client: Any) -> Path:
            from mlflow.artifacts import download_artifacts

            uri = client.get_model_version_download_uri(info.name, info.version)
            return Path(
                download_artifacts(
                    artifact_uri=uri, dst_path=str(folder), tracking_uri=self.tracking_uri
                )
            )

        what = f"the files of {info.name!r} version {info.version}"
        return self._call(fetch, what, self._download_timeout_s)

    def log_artifact(self, info: VersionInfo, file: Path, folder: str) -> None:
        """Keep a file beside the run that made a version, below ``folder``. Raises RegistryError
        for a version without a run."""
        if info.run_id is None:
            raise RegistryError(f"{info.name!r} version {info.version} has no run to keep files in")
        run_id = info.run_id
        self._call(lambda c: c.log_artifact(run_id, str(file), folder), info.name)

    def _call(
        self,
        function: Callable[[Any], T],
        what: object,
        timeout_s: float | None = None,
    ) -> T:
        limit_s = timeout_s or self._timeout_s
        if not self._answered:
            limit_s = max(limit_s, _FIRST_S)
        client = self._connected()
        future = self._threads.submit(lambda: function(client))
        try:
            with _translated(what, self.tracking_uri):
                found = future.result(limit_s)
        except FutureTimeout:
            future.cancel()
            raise RegistryError(
                f"the registry {_shown(self.tracking_uri)} did not answer within {limit_s:g} s "
                f"about {what}"
            ) from None
        self._answered = True
        return found

    def _connected(self) -> Any:
        with self._lock:
            if self._client is None:
                try:
                    from mlflow import MlflowClient
                except ImportError:
                    raise MissingExtraError("mlflow", "registry") from None
                # MLflow's defaults are 120 s a request and 7 retries; a caller of ours has long
                # gone by then. It reads them from the environment alone.
                os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", f"{self._timeout_s:.0f}")
                os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
                os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
                self._client = MlflowClient(self.tracking_uri, self.tracking_uri)
            return self._client


@contextlib.contextmanager
def _translated(what: object, uri: str) -> Iterator[None]:
    try:
        yield
    except (TwinpathError, FutureTimeout):
        raise
    except Exception as error:
        code = getattr(error, "error_code", "")
        text = str(error).strip().splitlines()[0][:300] if str(error).strip() else repr(error)
        if code == "RESOURCE_DOES_NOT_EXIST" or ("alias" in text and "not found" in text):
            raise UnknownModelError(f"the registry {_shown(uri)} has no {what}: {text}") from None
        if code == "INVALID_PARAMETER_VALUE" and "alias" in text:
            raise UnknownModelError(f"the registry {_shown(uri)} has no {what}: {text}") from None
        raise RegistryError(
            f"the registry {_shown(uri)} failed about {what}: {type(error).__name__}: {text}"
        ) from error


def _shown(uri: str) -> str:
    """A URI without the password that it may hold."""
    scheme, _, rest = uri.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}" if "@" in rest else uri


def _info(found: Any, aliases: tuple[str, ...] | None = None) -> VersionInfo:
    return VersionInfo(
        name=found.name,
        version=str(found.version),
        source=found.source or "",
        status=found.status or "READY",
        run_id=found.run_id or None,
        created_s=(found.creation_timestamp or 0) / 1000,
        description=found.description or "",
        aliases=tuple(found.aliases or ()) if aliases is None else aliases,
        tags=dict(found.tags or {}),
    )


def _state(found: Any) -> ModelState:
    return ModelState(
        found.name,
        dict(found.tags or {}),
        {alias: str(version) for alias, version in dict(found.aliases or {}).items()},
        found.description or "",
    )


def unknown_version(name: str, version: str, known: list[str]) -> UnknownModelError:
    """The error for a version that is not live here."""
    return UnknownModelError(
        f"model {name!r} has no live version {version!r} here.{did_you_mean(version, known)}"
    )
