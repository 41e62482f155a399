"""Other projects' clients, unmodified, against a served graph."""

from collections.abc import Callable

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(900)]


@pytest.mark.parametrize(
    ("client", "script"),
    [
        ("tritonclient", "triton.py"),
        ("kserve", "kserve_client.py"),
        ("mlserver", "mlserver_client.py"),
        ("mlserver", "mlserver_infer.py"),
    ],
)
def test_the_official_client_works_unmodified(
    run_client: Callable[[str, str], str], client: str, script: str
):
    assert f"all of {client}" in run_client(client, script)
