"""MLServer's own command for files of requests:  python mlserver_infer.py HTTP GRPC"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from every_dtype import TEXT, rows
from mlserver.codecs import NumpyCodec, StringCodec
from mlserver.types import InferenceRequest, InferenceResponse

HTTP = sys.argv[1]


def answers(model, requests, *options):
    """What the command wrote of each request, in their order."""
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder, "in.jsonl"), Path(folder, "out.jsonl")
        given.write_text("".join(r.model_dump_json(exclude_none=True) + "\n" for r in requests))
        command = [
            Path(sys.executable).with_name("mlserver"), "infer", "--url", f"{HTTP}/{model}",
            "--model-name", model, "--input-data-path", given, "--output-data-path", made,
            "--retries", "1", *options,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = [json.loads(line) for line in made.read_text().splitlines()]
    assert len(lines) == len(requests), done.stdout + done.stderr
    return sorted(lines, key=lambda line: line["parameters"]["batch_index"])


def outputs(line):
    assert "error" not in line, line
    return {output.name: output for output in InferenceResponse.model_validate(line).outputs}


def score(x):
    return InferenceRequest(inputs=[NumpyCodec.encode_input("x", np.array([x], np.float32))])


# One by one, several workers at once, and so many lines in one request: as JSON and in binary.
lines = [score([i, 9 + i, 3, 4]) for i in range(14, 54)]
for options in ([], ["--workers", "4"], ["--batch-size", "7"], ["--batch-size", "7", "-b"]):
    for i, line in enumerate(answers("scores", lines, *options), 14):
        found = outputs(line)
        wanted = [2 * i, 2 * (9 + i), 6, 8]
        assert NumpyCodec.decode_output(found["scores"]).ravel().tolist() == wanted, line
        assert NumpyCodec.decode_output(found["best"]).ravel().tolist() == [1], line

# A line that is refused is told, and the others are answered.
for i, line in enumerate(answers("scores", [score([1, 2, 3, 4]), score([13, 0, 0, 0])])):
    assert ("error" in line) == (i == 1), line
    assert i == 0 or "thirteen" in line["error"]["msg"], line

# Every datatype; tritonclient, by which the command sends, has FP16 in binary only.
inputs = [NumpyCodec.encode_input(name, values) for name, values in rows().items()]
inputs.append(StringCodec.encode_input("BYTES", TEXT.tolist(), use_bytes=False))
[line] = answers("wide", [InferenceRequest(inputs=inputs)], "-b")
found = outputs(line)
for name, values in rows().items():
    back = NumpyCodec.decode_output(found[name])
    assert back.astype(values.dtype).tobytes() == values.tobytes(), (name, back)
assert StringCodec.decode_output(found["BYTES"]) == TEXT.tolist()
sys.stdout.write("all of mlserver\n")
