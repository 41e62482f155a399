"""The batch job for texts, on a real engine in a real Ray Data: killed, and run again."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from llm import models
from llm.conftest import ENGINE, ENVIRONMENT

pytestmark = [pytest.mark.slow, pytest.mark.ray]
ROOT = Path(__file__).resolve().parents[2]
#: A prompt longer than the engine takes.
TOO_LONG = 17


def start(folder: Path, llama: Path, log: str, *more: str) -> subprocess.Popen[bytes]:
    """The command, as `ray job submit` would run it."""
    import json

    words = [
        "--model", llama, "--source", folder / "prompts.parquet", "--out", folder / "texts",
        "--keep", "id", "--max-tokens", "24", "--batch-size", "16", "--in-flight", "2",
        "--engine", json.dumps(ENGINE), "--environment", json.dumps(ENVIRONMENT),
        *more,
    ]  # fmt: skip
    path = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
    with (folder / log).open("wb") as sink:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "batch" / "generate.py"), *map(str, words)],
            env=os.environ | {"PYTHONPATH": path, "RAY_DATA_DISABLE_PROGRESS_BARS": "1"},
            stdout=sink, stderr=subprocess.STDOUT, cwd=folder,
        )  # fmt: skip


def commits(folder: Path) -> int:
    return len(list((folder / "texts").glob("run-*/*.parquet")))


@pytest.mark.timeout(600)
def test_a_killed_job_goes_on_with_every_prompt_once_and_the_same_texts(tmp_path, llama):
    prompts = models.prompts(640)
    prompts[TOO_LONG] = "late " * 400
    # One attempt writes the first of these, the next one the last.
    prompts[-16:] = prompts[:16]
    frame = pd.DataFrame({"id": range(640), "prompt": prompts})
    frame.to_parquet(tmp_path / "prompts.parquet")
    first = start(tmp_path, llama, "first.log")
    try:
        deadline_s = time.monotonic() + 250
        while commits(tmp_path) < 3:
            assert first.poll() is None, (tmp_path / "first.log").read_text()[-3000:]
            assert time.monotonic() < deadline_s, (tmp_path / "first.log").read_text()[-3000:]
            time.sleep(0.02)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    second = start(tmp_path, llama, "second.log")
    told = (tmp_path / "second.log").read_text
    assert second.wait(timeout=300) == 0, told()[-3000:]

    texts = pd.read_parquet(tmp_path / "texts").sort_values("id")
    assert texts["id"].tolist() == [i for i in range(640) if i != TOO_LONG]
    dead = pd.read_parquet(tmp_path / "texts.dead_letters")
    assert dead["id"].tolist() == [TOO_LONG]
    assert "maximum context length is 256" in dead["error_message"][0]
    said = re.search(
        r"639 texts \((\d+) rows done before\), 1 dead letters, (\d+) tokens read, (\d+) written",
        told(),
    )
    assert said is not None, told()[-3000:]
    assert 0 < int(said[1]) < 640
    assert int(said[2]) == texts["prompt_tokens"].sum() > 0
    assert int(said[3]) == texts["completion_tokens"].sum() > 0
    assert (texts["completion_tokens"] <= 24).all()
    written = dict(zip(texts["id"], texts["text"], strict=True))
    assert [written[i] for i in range(16)] == [written[624 + i] for i in range(16)]
    short = texts[texts["completion_tokens"] < 24]
    assert (short["finish_reason"] == "stop").all()

    other = start(tmp_path, llama, "other.log", "--temperature", "0.5")
    assert other.wait(timeout=120) == 1
    assert "was begun by a job with another setting" in (tmp_path / "other.log").read_text()
