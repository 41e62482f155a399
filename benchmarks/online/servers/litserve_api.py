"""LitServe: ``python -m benchmarks.online.servers.litserve_api MODEL PORT``."""

import sys

import litserve as ls
import numpy as np

from benchmarks.online.models import load


class Api(ls.LitAPI):
    """Rows in, rows out, many requests at a time."""

    def __init__(self, model):
        # Its default timeout: batches of what is waiting. Of 0, 1 and 5 ms the fastest here.
        super().__init__(max_batch_size=64, batch_timeout=0.0)
        self.model = model

    def setup(self, device):
        """Once for each worker."""
        self._predict = load(self.model)

    def decode_request(self, request):
        """One body."""
        return np.asarray(request["x"], dtype=np.float32)

    def batch(self, inputs):
        """Requests may have several rows each, so they are joined and not stacked."""
        return np.concatenate(inputs), [len(x) for x in inputs]

    def predict(self, batched):
        """All rows at once, and a part for each request."""
        joined, sizes = batched
        return np.split(self._predict(joined), np.cumsum(sizes)[:-1])

    def unbatch(self, output):
        """Split already."""
        return output

    def encode_response(self, output):
        """One answer."""
        return {"y": output.tolist()}


if __name__ == "__main__":
    # One worker: a second one halves the batches and competes with the HTTP server for 2 cores.
    # fast_queue is what its documentation advises from 100 requests/s upwards.
    server = ls.LitServer(
        Api(sys.argv[1]), accelerator="cpu", workers_per_device=1, fast_queue=True
    )
    server.run(
        host="127.0.0.1", port=int(sys.argv[2]), num_api_servers=1, log_level="warning",
        generate_client_file=False, access_log=False,
    )  # fmt: skip
