"""A run small enough for a test: a model of a few thousand parameters and rows of random tokens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models

from dsfast.config import Config
from dsfast.data import Dataset, PackedRows
from dsfast.tokens import BOS_ID, EOS_ID

VOCABULARY = 300
_MODEL = {
    "vocab_size": VOCABULARY, "embedding_rank": 8, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "intermediate_size": 32,
    "moe_intermediate_size": 16, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "first_k_dense_replace": 1, "max_position_embeddings": 32, "tie_word_embeddings": True,
}  # fmt: skip
_TRAIN = {"steps": 10, "batch_size": 3, "warmup_steps": 2, "optimizer": "muon", "weight_decay": 0.1, "log_every": 5}


def tiny_config(**changes) -> Config:
    """The run's config with dotted names changed."""
    values = {
        "name": "tiny",
        "model": _MODEL,
        "train": _TRAIN,
        "data": {"sequence_length": 16},
        "runtime": {"threads": 1},
    }
    return Config.from_dict(values).replace(**changes)


def tiny_dataset(seed: int = 0, sequence_length: int = 16) -> Dataset:
    """Documents of 2 to 30 random tokens, 40 rows of them."""
    random = np.random.default_rng(seed)
    stream = random.integers(3, VOCABULARY, 40 * sequence_length + 1)
    ends = np.cumsum(random.integers(4, 32, len(stream) // 16))
    ends = ends[ends < len(stream) - 1]
    stream[ends], stream[ends + 1], stream[0] = EOS_ID, BOS_ID, BOS_ID
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    rows = PackedRows(stream.astype(np.int32), sequence_length, seed)
    return Dataset(tokenizer, rows, {"source": "random", "seed": seed, "rows": len(rows)}, [])


def write_text_run(folder: Path, **changes) -> Path:
    """A config file for the command line, and the .txt file it trains on; returns the config's path."""
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("abcdefghij"), 5)) for _ in range(60)]
    text = "\n\n".join(" ".join(random.choice(words, 40)) for _ in range(30))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    config = tiny_config(**{"data.source": str(folder / "text.txt"), **changes})
    path = folder / "config.json"
    path.write_text(json.dumps(config.to_dict()), encoding="utf-8")
    return path
