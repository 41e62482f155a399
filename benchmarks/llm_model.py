"""The tiny model of the benchmarks of language models, and its graph."""

import os
import random
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from twinpath import Graph
from twinpath.nodes.llm import LLM

_TEXT = "the flight from Newark is late on time weather carrier gate why my bag please when"
_WORDS = _TEXT.split()


class Prompt(BaseModel):
    """What is asked."""

    prompt: str


class Text(BaseModel):
    """What is written."""

    text: str


def prompts(count: int) -> list[str]:
    """So many different prompts."""
    source = random.Random(3)
    return [f"{number} " + " ".join(source.choices(_WORDS, k=12)) for number in range(count)]


def make_model(folder: Path) -> None:
    """A Llama of two layers with random weights and a trained tokenizer, unless it is there."""
    if (folder / "config.json").exists():
        return
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(prompts(400), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512,
        bos_token_id=0, eos_token_id=1, tie_word_embeddings=False, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def app(args: dict[str, Any]) -> Any:
    """Serve's builder of the graph that is the engine."""
    from benchmarks.llm_serving import ENGINE

    graph = Graph("llm", input=Prompt, output=Text)
    with graph as rows:
        graph.output(LLM(os.environ["TWINPATH_BENCH_LLM"], engine=ENGINE)(rows))
    return graph.app(args)
