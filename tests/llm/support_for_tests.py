"""The support graph with small models: what a worker of Ray imports, and what a job runs."""

import json
import os
import sys

import pandas as pd

from graphs.support import support

support_graph = support(
    os.environ["TWINPATH_TEST_MINILM"],
    os.environ["TWINPATH_TEST_LLAMA"],
    engine=json.loads(os.environ["TWINPATH_TEST_ENGINE"]),
    max_reply_chars=20,
)
support_app = support_graph.app

if __name__ == "__main__":
    source, sink = sys.argv[1:]
    done = support_graph.job(pd.read_parquet(source), sink, keep=["id"], workers=1).run()
    assert (done.rows, done.dead_letters) == (len(pd.read_parquet(source)), 0), done
