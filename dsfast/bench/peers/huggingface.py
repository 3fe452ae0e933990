"""transformers' DeepseekV3ForCausalLM with the weights of a dsfast model; needs the extra [bench]."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models

from dsfast.model import DeepseekV3, export_huggingface
from dsfast.tokens import BOS, EOS, PAD

INSTALL = "transformers is not installed; run `pip install 'dsfast[bench]'`"


def missing() -> str:
    """Why this peer cannot run, "" if it can."""
    return "" if importlib.util.find_spec("transformers") else INSTALL


def from_dsfast(model: DeepseekV3) -> Any:
    """The same model in transformers, float32, by way of the exported folder; its embedding is the merged [V, D]."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    # The export wants a tokenizer; nothing is tokenized here.
    tokenizer = Tokenizer(models.WordLevel({BOS: 0, EOS: 1, PAD: 2}, unk_token=PAD))
    with tempfile.TemporaryDirectory() as folder:
        export_huggingface(model, tokenizer, Path(folder) / "model")
        return transformers.DeepseekV3ForCausalLM.from_pretrained(Path(folder) / "model")
