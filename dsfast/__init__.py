"""dsfast: DeepSeek-V3 models small enough to train while you watch, with kernels of their own.

The names below are the public interface and stay as they are; everything else may change between versions.
"""

import gc
from pathlib import Path

_COLLECTED = gc.isenabled()
gc.disable()  # what an import makes stays, most of it torch's: to look for garbage in it takes a sixth of the time

_TREE = Path(__file__).parents[1]
if (_TREE / "triton_kernels" / "__init__.py").exists():
    # In a source tree `triton_kernels` and `configs` lie beside, also where nothing installed it.
    __path__.append(str(_TREE))

try:
    from dsfast.command import ctrl_c_ends_at_once

    with ctrl_c_ends_at_once():
        from dsfast import ops
        from dsfast.config import Config, load_config
        from dsfast.errors import UserError
        from dsfast.generate import generate
        from dsfast.model import DeepseekV3, generate_ids, import_huggingface
        from dsfast.train import Trainer, load_checkpoint
finally:
    if _COLLECTED:
        gc.enable()

__version__ = "0.1.0"
__all__ = [
    "Config", "DeepseekV3", "Trainer", "UserError", "generate", "generate_ids", "import_huggingface", "load_checkpoint",
    "load_config", "ops",
]  # fmt: skip
