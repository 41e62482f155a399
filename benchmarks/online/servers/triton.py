"""Triton's Python backend: ``model.py`` of every model in the repository is this file."""

import os
import sys

import numpy as np
import triton_python_backend_utils as pb_utils

# The backend's interpreter takes no notice of PYTHONPATH.
sys.path.append(os.environ["BENCHMARK_ROOT"])
from benchmarks.online.models import load


class TritonPythonModel:
    """Joins the requests that the dynamic batcher hands over, predicts once and splits."""

    def initialize(self, args):
        """Once for each instance."""
        self.predict = load(args["model_name"])

    def execute(self, requests):
        """One batch of requests."""
        given = [pb_utils.get_input_tensor_by_name(each, "x").as_numpy() for each in requests]
        if len(given) == 1:
            return [_response(self.predict(given[0]))]
        answers = self.predict(np.concatenate(given))
        stops = np.cumsum([len(x) for x in given])[:-1]
        return [_response(each) for each in np.split(answers, stops)]


def _response(values):
    return pb_utils.InferenceResponse([pb_utils.Tensor("y", values)])
