"""Nodes of the support graph, but for the engine: sentences to vectors, vectors to intents, the
question to the language model, and the answer."""

import json
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict
from pydantic_core import from_json

from twinpath import Node
from twinpath.errors import ConfigError
from twinpath.graph.columns import Columns

#: Numbers of a sentence's vector, by all-MiniLM-L6-v2.
SIZE = 384
#: Intent of a message that fits none.
OTHER = "other"
#: Control characters to ones of Unicode's private use area, and back.
_AWAY = {code: 0xE000 + code for code in range(0x20)}
_BACK = {there: code for code, there in _AWAY.items()}


@cache
def intents() -> dict[str, dict[str, Any]]:
    """Intent → its reply, whether it is urgent, and messages that people write for it."""
    found: dict[str, dict[str, Any]] = json.loads(
        Path(__file__).with_name("intents.json").read_text()
    )
    return found


class Verdict(BaseModel):
    """What the language model is made to write."""

    model_config = ConfigDict(extra="forbid")

    intent: str
    urgent: bool
    reply: str


def verdict_schema(max_reply_chars: int = 400) -> dict[str, Any]:
    """JSON schema of a verdict, with the intents that there are."""
    return {
        "type": "object",
        "properties": {
            "intent": {"enum": [*intents(), OTHER]},
            "urgent": {"type": "boolean"},
            "reply": {"type": "string", "minLength": 1, "maxLength": max_reply_chars},
        },
        "required": ["intent", "urgent", "reply"],
        "additionalProperties": False,
    }


class Sentences(Node):
    """``message`` → ``vector``: the mean of its tokens' vectors, of unit length, as the model's
    card says (sentence-transformers/all-MiniLM-L6-v2; Reimers and Gurevych 2019,
    arXiv:1908.10084). Raises ConfigError at setup when the weights are not there."""

    inputs = {"message": "str"}
    outputs = {"vector": f"float32[{SIZE}]"}

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def setup(self) -> None:
        """Load weights and tokenizer."""
        if not (Path(self.folder) / "config.json").exists():
            raise ConfigError(
                f"no embedding model at {self.folder}: run python -m graphs.support_model.prepare"
            )
        from transformers import AutoModel, AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(self.folder)
        self._model: Any = AutoModel.from_pretrained(self.folder).eval()

    def predict(self, columns: Columns) -> Columns:
        """Unit vectors, float32 (n, 384)."""
        return {"vector": self.vectors(columns["message"].tolist())}

    def vectors(self, texts: list[str]) -> np.ndarray:
        """Of n texts, (n, 384)."""
        import torch

        tokens = self._tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            states = self._model(**tokens).last_hidden_state
            mask = tokens["attention_mask"].unsqueeze(-1)
            mean = (states * mask).sum(1) / mask.sum(1)
            unit = torch.nn.functional.normalize(mean, dim=1)
        vectors: np.ndarray = unit.numpy().astype(np.float32)
        return vectors


class Intents(Sentences):
    """``vector`` → ``intent`` and ``confidence`` by the nearest examples: the share of the ``k``
    nearest ones' weight that is the winner's, times how near the nearest of them is. A weight is
    the cosine to the power of 8, so that near ones count."""

    inputs = {"vector": f"float32[{SIZE}]"}
    outputs = {"intent": "str", "confidence": "float32"}

    def __init__(self, folder: str, k: int = 5) -> None:
        super().__init__(folder)
        self.k = k

    def setup(self) -> None:
        """Embed the examples."""
        super().setup()
        pairs = [(name, text) for name, entry in intents().items() for text in entry["examples"]]
        self._names = list(intents())
        self._owner = np.array([self._names.index(name) for name, _ in pairs])
        self._examples = self.vectors([text for _, text in pairs])

    def predict(self, columns: Columns) -> Columns:
        """The winner of each row."""
        cosine = columns["vector"] @ self._examples.T
        nearest = np.argpartition(-cosine, self.k, axis=1)[:, : self.k]
        near = np.clip(np.take_along_axis(cosine, nearest, axis=1), 0, 1)
        weight = near**8
        votes = np.zeros((len(cosine), len(self._names)), np.float32)
        for column in range(self.k):
            owner = self._owner[nearest[:, column]]
            np.add.at(votes, (np.arange(len(votes)), owner), weight[:, column])
        winner = votes.argmax(axis=1)
        share = votes.max(axis=1) / np.maximum(votes.sum(axis=1), 1e-9)
        names = np.array(self._names, dtype=object)
        return {
            "intent": names[winner],
            "confidence": (share * near.max(axis=1)).astype(np.float32),
        }


class Question(Node):
    """``message`` → ``chat``, the question to the language model. It begins with the same text for
    all, which an engine with prefix caching reads once."""

    inputs = {"message": "str"}
    outputs = {"chat": "str"}

    def predict(self, columns: Columns) -> Columns:
        """One chat a row, as JSON."""
        system = f"Sort the message and reply. Intents: {', '.join([*intents(), OTHER])}."
        chats = np.empty(len(columns["message"]), dtype=object)
        chats[:] = [
            json.dumps(
                [{"role": "system", "content": system}, {"role": "user", "content": message}]
            )
            for message in columns["message"]
        ]
        return {"chat": chats}


class Answer(Node):
    """The intent's own reply where the classifier was sure, else the language model's verdict. A
    verdict that breaks off or breaks the schema goes to a person."""

    inputs = {"intent": "str", "confidence": "float32", "verdict": "str"}
    outputs = {
        "intent": "str", "reply": "str", "urgent": "bool", "answered_by": "str",
    }  # fmt: skip

    def predict(self, columns: Columns) -> Columns:
        """``answered_by`` is ``examples``, ``model`` or ``person``."""
        return self._columns(
            [
                self._known(intent) if verdict is None else self._judged(verdict)
                for intent, verdict in zip(columns["intent"], columns["verdict"], strict=True)
            ]
        )

    async def follow(self, batches: AsyncIterator[Columns]) -> AsyncIterator[Columns]:
        """The answer to one message as the model writes it: each part has what is new of the
        reply, the last one the rest, or a person's where the verdict turns out to be none."""
        text, sent = "", ""
        async for columns in batches:
            if columns["verdict"][0] is None:
                yield self.predict(columns)
                return
            text += columns["verdict"][0]
            begun = self._begun(text)
            if begun is not None and begun["reply"] != sent:
                new = begun["reply"][len(sent) :]
                sent = begun["reply"]
                yield self._columns([begun | {"reply": new}])
        last = self._judged(text)
        if last["answered_by"] == "model":
            last["reply"] = last["reply"][len(sent) :]
        yield self._columns([last])

    @staticmethod
    def _begun(text: str) -> dict[str, Any] | None:
        """A verdict whose reply may still grow."""
        for text_here in (text, text.translate(_AWAY)):  # as it may stand in strings; see _judged
            with suppress(ValueError):
                found = from_json(text_here, allow_partial="trailing-strings")
                verdict = Verdict.model_validate(found).model_dump()
                return verdict | {
                    "reply": verdict["reply"].translate(_BACK),
                    "answered_by": "model",
                }
        return None

    @staticmethod
    def _columns(rows: list[dict[str, Any]]) -> Columns:
        found: Columns = {"urgent": np.array([row["urgent"] for row in rows], dtype=bool)}
        for name in ("intent", "reply", "answered_by"):
            found[name] = np.empty(len(rows), dtype=object)
            found[name][:] = [row[name] for row in rows]
        return found

    def _known(self, intent: str) -> dict[str, Any]:
        entry = intents()[intent]
        return {
            "intent": intent, "reply": entry["reply"], "urgent": entry["urgent"],
            "answered_by": "examples",
        }  # fmt: skip

    def _judged(self, text: str) -> dict[str, Any]:
        try:
            # Not strict: the grammar that holds the model to the schema lets control characters
            # stand in strings as they are.
            verdict = Verdict.model_validate(json.loads(text, strict=False))
        except ValueError:
            reply = "A colleague will read your message and answer it."
            return {"intent": OTHER, "reply": reply, "urgent": True, "answered_by": "person"}
        return verdict.model_dump() | {"answered_by": "model"}
