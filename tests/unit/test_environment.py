"""The environment of a fast Serve, and what is said where it is missing."""

from twinpath.online.environment import FAST_PATH, slow_path


def test_with_the_fast_path_there_is_nothing_to_say():
    assert slow_path(FAST_PATH | {"PATH": "/bin"}) is None
    assert slow_path(FAST_PATH, None) is None
    assert "request_timeout_s is 2.5" in (slow_path(FAST_PATH, 2.5) or "")


def test_a_serve_without_it_is_told_what_is_missing_and_what_to_do():
    text = slow_path({}) or ""
    for name in (
        "RAY_SERVE_ENABLE_HA_PROXY",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH",
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD",
    ):
        assert f"{name} is not set" in text
    assert 'eval "$(twinpath env)"' in text


def test_one_variable_that_is_something_else_is_named_with_its_value():
    text = slow_path(FAST_PATH | {"RAY_SERVE_ENABLE_HA_PROXY": "0"}) or ""
    assert "RAY_SERVE_ENABLE_HA_PROXY is 0" in text
    assert "CALLBACK" not in text
