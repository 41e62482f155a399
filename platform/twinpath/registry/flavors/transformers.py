"""transformers: classifiers and embeddings of one text column, from weights in safetensors.

Code that comes with a model is never run (``trust_remote_code`` is off), and nothing is looked for
anywhere but in the version's files.
"""

from typing import Any

import numpy as np

from twinpath.errors import MissingExtraError, ModelLoadError
from twinpath.graph.columns import Columns
from twinpath.registry.device import TorchRunner, torch_module
from twinpath.registry.flavors.model import LoadOptions
from twinpath.registry.manifest import Manifest

_CLASSIFY = ("text-classification", "sentiment-analysis")
_EMBED = ("feature-extraction", "sentence-similarity")


class TextModel:
    """Text → probabilities (n, classes), or the mean of the last hidden state (n, width)."""

    def __init__(self, model: Any, tokenizer: Any, classify: bool, options: LoadOptions) -> None:
        self._runner = TorchRunner(model, options.torch)
        self._tokenizer, self._classify = tokenizer, classify
        #: Also the longest text that fixed positions allow.
        limit = getattr(model.config, "max_position_embeddings", 512)
        self._limit = min(int(limit), int(getattr(tokenizer, "model_max_length", limit)))
        size = self._runner.weights_bytes
        on_gpu = self._runner.device.type == "cuda"
        self.host_bytes, self.vram_bytes = (0, size) if on_gpu else (size, 0)

    def predict(self, inputs: Columns) -> Any:
        """See `Model`."""
        texts = ["" if text is None else str(text) for text in next(iter(inputs.values())).tolist()]
        tokens = dict(
            self._tokenizer(
                texts, padding=True, truncation=True, max_length=self._limit, return_tensors="pt"
            )
        )
        answer = self._runner.run_named(tokens)
        torch = torch_module()
        with torch.inference_mode():
            if self._classify:
                found = answer.logits.float().softmax(dim=-1)
            else:
                mask = tokens["attention_mask"].to(answer.last_hidden_state.device).unsqueeze(-1)
                hidden = answer.last_hidden_state.float()
                found = (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
            return np.asarray(found.cpu().numpy())


def load(manifest: Manifest, options: LoadOptions) -> TextModel:
    """The model and tokenizer of a version. Raises MissingExtraError, ModelLoadError."""
    torch_module()
    try:
        import transformers
    except ImportError:
        raise MissingExtraError("transformers", "flavors") from None
    flavor = manifest.flavors["transformers"]
    task = str(flavor.get("task"))
    if task not in (*_CLASSIFY, *_EMBED):
        known = ", ".join((*_CLASSIFY, *_EMBED))
        raise ModelLoadError(f"task {task!r} is not served here: expected one of {known}")
    folder = manifest.file(str(flavor.get("model_binary") or "model"))
    tokens = manifest.folder / "components" / "tokenizer"
    classify = task in _CLASSIFY
    kind = transformers.AutoModelForSequenceClassification if classify else transformers.AutoModel
    local = {"local_files_only": True, "trust_remote_code": False}
    model = kind.from_pretrained(folder, use_safetensors=True, **local)
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        tokens if tokens.is_dir() else folder, **local
    )
    return TextModel(model, tokenizer, classify, options)
