"""Closed-loop HTTP load with wrk (Debian's package), so that the client is not the limit."""

import json
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

_SCRIPT = """
local bodies = {%s}
local at = 0
wrk.method = "POST"
wrk.headers["content-type"] = "application/json"
request = function()
  at = at %% #bodies + 1
  return wrk.format(nil, nil, nil, bodies[at])
end
done = function(summary, latency, requests)
  io.write(string.format('\\nRESULT {"requests":%%d,"duration_us":%%d,"bad":%%d,' ..
    '"p50_us":%%d,"p99_us":%%d}\\n', summary.requests, summary.duration,
    summary.errors.status + summary.errors.connect + summary.errors.read + summary.errors.timeout,
    latency:percentile(50), latency:percentile(99)))
end
"""


@dataclass(frozen=True)
class Load:
    """What a run of wrk measured; ``bad`` counts answers that are not 2xx, and broken ones."""

    per_s: float
    p50_ms: float
    p99_ms: float
    bad: int


def load(url: str, bodies: list[bytes], connections: int, duration_s: float) -> Load:
    """POST the bodies in turn. Raises SystemExit when wrk is not installed."""
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is not installed; it is Debian's package: apt-get install wrk")
    quoted = ", ".join("[==[" + body.decode() + "]==]" for body in bodies)
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "post.lua"
        script.write_text(_SCRIPT % quoted)
        done = subprocess.run(
            ["wrk", "-t1", f"-c{connections}", f"-d{duration_s:g}s", "-s", str(script), url],
            capture_output=True, text=True, timeout=duration_s + 60, check=True,
        )  # fmt: skip
    found = json.loads(done.stdout.split("RESULT ")[1])
    return Load(
        found["requests"] / found["duration_us"] * 1e6,
        found["p50_us"] / 1000,
        found["p99_us"] / 1000,
        found["bad"],
    )
