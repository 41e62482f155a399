"""MLflow's webhooks: what changed in the registry is read soon, however seldom it is polled.

A delivery is signed, so it needs no key of the gateway: HMAC-SHA256 with the webhook's secret over
``<delivery id>.<timestamp>.<body>`` (Standard Webhooks; MLflow's documentation, "Webhooks"). One
that is lost does no harm, as replicas poll besides; one that is sent twice makes them read twice.
"""

import base64
import hashlib
import hmac
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twinpath.errors import AccessError, ConfigError

#: Where MLflow is to send them, below the app's root.
PATH = "/registry/webhook"
SIGNATURE, TIMESTAMP, DELIVERY = "x-mlflow-signature", "x-mlflow-timestamp", "x-mlflow-delivery-id"
#: Deliveries that were signed longer ago are refused, as somebody may have kept them.
MAX_AGE_S = 300.0


def secret_of(path: Path) -> bytes:
    """The webhook's secret, which is read each time so that it can be changed. Raises ConfigError
    when there is none."""
    try:
        secret = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"rollouts.webhook_secret_file {str(path)!r}: {error.strerror}") from None
    if not secret:
        raise ConfigError(f"rollouts.webhook_secret_file {str(path)!r} is empty")
    return secret


def verify(
    secret: bytes, headers: Mapping[str, str], body: bytes, now_s: float | None = None
) -> None:
    """Raises AccessError for a delivery that was not signed with the secret, or too long ago."""
    signature, stamp = headers.get(SIGNATURE, ""), headers.get(TIMESTAMP, "")
    signed = f"{headers.get(DELIVERY, '')}.{stamp}.".encode() + body
    digest = hmac.new(secret, signed, hashlib.sha256).digest()
    right = b"v1," + base64.b64encode(digest)
    if not hmac.compare_digest(right, signature.encode()):
        raise AccessError(
            f"{SIGNATURE}: not a signature of this delivery by the secret in "
            "rollouts.webhook_secret_file; give the same one to create_webhook(secret=…)"
        )
    now_s = time.time() if now_s is None else now_s
    if abs(now_s - int(stamp)) > MAX_AGE_S:
        raise AccessError(f"{TIMESTAMP} {stamp}: not within {MAX_AGE_S:g} s of now")


def model_of(delivery: Mapping[str, Any]) -> str | None:
    """The registered model that a delivery is about; None for other events, such as prompts'."""
    data = delivery.get("data")
    name = data.get("name") if isinstance(data, Mapping) else None
    return name if isinstance(name, str) else None
