"""Closed-loop HTTP load with wrk (Debian's package), so that the client is not the limit."""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

#: Requests are written out before the clock starts, from a file, since bodies may be binary.
_SCRIPT = """
local sizes = {%s}
local requests = {}
local at = 0
wrk.method = "POST"
%s
init = function(args)
  local file = assert(io.open("%s", "rb"))
  for i, size in ipairs(sizes) do
    requests[i] = wrk.format(nil, nil, nil, file:read(size))
  end
  file:close()
end
request = function()
  at = at %% #requests + 1
  return requests[at]
end
done = function(summary, latency, requests)
  io.write(string.format('\\nRESULT {"requests":%%d,"duration_us":%%d,"bad":%%d,' ..
    '"p50_us":%%d,"p99_us":%%d}\\n', summary.requests, summary.duration,
    summary.errors.status + summary.errors.connect + summary.errors.read + summary.errors.timeout,
    latency:percentile(50), latency:percentile(99)))
end
"""
#: A slow answer is not a bad one: wrk's own 2 s are less than what slow servers take at 128
#: connections.
_PATIENCE_S = 20
_JSON = {"content-type": "application/json"}


@dataclass(frozen=True)
class Load:
    """What a run of wrk measured; ``bad`` counts answers that are not 2xx, and broken ones."""

    per_s: float
    p50_ms: float
    p99_ms: float
    bad: int


def script(bodies: list[bytes], headers: Mapping[str, str], file: Path) -> str:
    """The Lua script that asks with these bodies, which it finds in ``file``."""
    sizes = ", ".join(str(len(body)) for body in bodies)
    lines = (
        f"wrk.headers[{json.dumps(name)}] = {json.dumps(value)}" for name, value in headers.items()
    )
    return _SCRIPT % (sizes, "\n".join(lines), file)


def load(
    url: str,
    bodies: list[bytes],
    connections: int,
    duration_s: float,
    headers: Mapping[str, str] = _JSON,
) -> Load:
    """POST the bodies in turn for a whole number of seconds: wrk reads no other. Raises SystemExit
    when wrk is not installed."""
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is not installed; it is Debian's package: apt-get install wrk")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bodies"
        file.write_bytes(b"".join(bodies))
        post = Path(folder) / "post.lua"
        post.write_text(script(bodies, headers, file))
        done = subprocess.run(
            [
                "wrk", "-t1", f"-c{connections}", f"-d{duration_s:g}s", "-s", str(post),
                f"--timeout={_PATIENCE_S}s", url,
            ],
            capture_output=True, text=True, timeout=duration_s + 60, check=True,
        )  # fmt: skip
    found = json.loads(done.stdout.split("RESULT ")[1])
    return Load(
        found["requests"] / found["duration_us"] * 1e6,
        found["p50_us"] / 1000,
        found["p99_us"] / 1000,
        found["bad"],
    )
