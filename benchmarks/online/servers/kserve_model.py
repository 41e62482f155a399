"""KServe's Python server: ``python -m benchmarks.online.servers.kserve_model --model_name …``."""

from kserve import InferOutput, InferResponse, Model, ModelServer, logging, model_server

from benchmarks.online.models import load


class Predictor(Model):
    """One tensor in, one out. Batching is in KServe's agent for Kubernetes, not in this server."""

    def load(self):
        """Once for each process."""
        self._predict = load(self.name)
        self.ready = True
        return True

    def predict(self, payload, headers=None, response_headers=None):
        """One request."""
        y = self._predict(payload.inputs[0].as_numpy())
        output = InferOutput(name="y", shape=list(y.shape), datatype="FP32")
        output.set_data_from_numpy(y, binary_data=False)
        return InferResponse(
            response_id=payload.id or "", model_name=self.name, infer_outputs=[output]
        )


if __name__ == "__main__":
    arguments, _ = model_server.parser.parse_known_args()
    logging.configure_logging(arguments.log_config_file)
    model = Predictor(arguments.model_name)
    model.load()
    ModelServer().start([model])
