"""``twinpath models``, on a real registry."""

import json

import pytest
from registered_models import Shelf, constant, skops
from typer.testing import CliRunner

from twinpath.cli.main import app
from twinpath.errors import ConfigError, RolloutError, UnknownModelError
from twinpath.registry.reference import LIVE_TAG, REFUSED_TAG, ROLLOUT_TAG
from twinpath.rollout.state import RolloutState

pytestmark = pytest.mark.timeout(300)
NAME = "commanded"


def run(shelf: Shelf, *words: str) -> str:
    """The command's output. Raises what the command raises."""
    done = CliRunner().invoke(
        app, ["models", *words, "--registry", shelf.uri], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def shelf(on_file: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    """Three versions; the first serves."""
    folder = tmp_path_factory.mktemp("commanded")
    for number, p in enumerate((0.25, 0.5, 0.75)):
        files = skops(folder / str(number), constant(p))
        on_file.register(NAME, files, "champion" if number == 0 else None)
    return on_file


def serves(shelf: Shelf) -> str:
    found = json.loads(run(shelf, "show", NAME, "--json"))
    return str(found["aliases"]["champion"])


def test_models_are_listed_with_what_serves(shelf: Shelf):
    assert "champion → 1" in run(shelf, "list")
    [mine] = [m for m in json.loads(run(shelf, "list", "--json")) if m["model"] == NAME]
    assert mine["aliases"] == {"champion": "1"}


def test_a_promotion_is_followed_by_a_rollback_to_what_served_before(shelf: Shelf):
    assert "version 2" in run(shelf, "promote", NAME, "2")
    assert serves(shelf) == "2"
    done = json.loads(run(shelf, "rollback", NAME, "--json"))
    assert done == {"model": NAME, "alias": "champion", "version": "1"}
    assert serves(shelf) == "1"


def test_a_pinned_version_is_kept_live_until_it_is_let_go(shelf: Shelf):
    assert json.loads(run(shelf, "pin", NAME, "3", "--json"))["live"] == ["3"]
    assert shelf.client.get_registered_model(NAME).tags[LIVE_TAG] == "3"
    assert "kept" in run(shelf, "show", NAME)
    run(shelf, "pin", NAME, "3", "--off")
    assert LIVE_TAG not in shelf.client.get_registered_model(NAME).tags


def test_what_is_not_there_cannot_be_promoted(shelf: Shelf):
    with pytest.raises(UnknownModelError):
        run(shelf, "promote", NAME, "99")
    with pytest.raises(UnknownModelError):
        run(shelf, "show", "nothing-of-that-name")


def test_a_version_that_was_refused_is_not_promoted_by_hand_either(shelf: Shelf):
    shelf.client.set_model_version_tag(NAME, "3", REFUSED_TAG, "model_check: NaN")
    try:
        assert "NaN" in run(shelf, "show", NAME)
        with pytest.raises(RolloutError, match="NaN"):
            run(shelf, "promote", NAME, "3")
    finally:
        shelf.client.delete_model_version_tag(NAME, "3", REFUSED_TAG)


def test_a_rollout_under_way_is_not_cut_across_unless_forced(shelf: Shelf):
    state = RolloutState(id="r", model=NAME, incumbent="1", challenger="2", share=0.05)
    shelf.client.set_registered_model_tag(NAME, ROLLOUT_TAG, state.to_tag())
    try:
        with pytest.raises(ConfigError, match="under way"):
            run(shelf, "promote", NAME, "2")
        run(shelf, "promote", NAME, "2", "--force")
        assert serves(shelf) == "2"
        run(shelf, "promote", NAME, "1", "--force")
    finally:
        shelf.client.delete_registered_model_tag(NAME, ROLLOUT_TAG)


def test_without_a_registry_the_command_says_what_to_set(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI"):
        CliRunner().invoke(app, ["models", "list"], catch_exceptions=False)
