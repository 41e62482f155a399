"""MLServer: the ``implementation`` of a model whose settings name it."""

from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse

from benchmarks.online.models import load


class Model(MLModel):
    """One tensor in, one out; MLServer joins and splits the requests."""

    async def load(self):
        """Once for each process."""
        self._predict = load(self.name)
        return True

    async def predict(self, payload):
        """A request, or several joined."""
        x = NumpyCodec.decode_input(payload.inputs[0])
        output = NumpyCodec.encode_output("y", self._predict(x))
        return InferenceResponse(model_name=self.name, outputs=[output])
