"""Text for training: facts, the articles that teach them, tokenizer, packed rows; and the questions asked after."""

from dsfast.data.articles import write_articles
from dsfast.data.dataset import Dataset, build_dataset
from dsfast.data.facts import Fact, heldout_prompts, load_facts, taught_facts, taught_prompts
from dsfast.data.packing import Batch, PackedRows
from dsfast.data.prompts import Prompt, PromptSets, load_prompts
from dsfast.data.tokenizer import check_tokenizer, for_texts, load_tokenizer, reading_no_special_tokens, train_tokenizer

__all__ = [
    "Batch",
    "Dataset",
    "Fact",
    "PackedRows",
    "Prompt",
    "PromptSets",
    "build_dataset",
    "check_tokenizer",
    "for_texts",
    "heldout_prompts",
    "load_facts",
    "load_prompts",
    "load_tokenizer",
    "reading_no_special_tokens",
    "taught_facts",
    "taught_prompts",
    "train_tokenizer",
    "write_articles",
]
