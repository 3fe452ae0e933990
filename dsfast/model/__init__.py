"""The DeepSeek-V3 model: training, generation, and the way to and from Hugging Face."""

from dsfast.model.capture import captured
from dsfast.model.deepseek_v3 import DeepseekV3, parameter_counts
from dsfast.model.generate import generate, generate_ids
from dsfast.model.huggingface import export_huggingface, import_huggingface, why_not_exported
from dsfast.model.native_step import NativeStep
from dsfast.model.precision import (
    FixedWeights,
    any_native_products,
    copy_all,
    gpu_has_bfloat16,
    loss_in,
    precision_of,
)

__all__ = [
    "DeepseekV3",
    "FixedWeights",
    "NativeStep",
    "any_native_products",
    "captured",
    "copy_all",
    "export_huggingface",
    "generate",
    "generate_ids",
    "gpu_has_bfloat16",
    "import_huggingface",
    "loss_in",
    "parameter_counts",
    "precision_of",
    "why_not_exported",
]
