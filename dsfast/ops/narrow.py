"""What stands for several operators on a GPU where a model is so narrow that a tile of tokens, and what it is multiplied by, fit
into one program: `mla_project` and `mla_output`. There is no C++ for them and they are none of `OPERATORS`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dsfast.ops.dispatch import choose


def at_once(x: Tensor, widths: Mapping[str, int], widest: Mapping[str, int], instead_of: Sequence[str]) -> bool:
    """Whether one launch takes tokens such as `x`: no padded width above the widest, and each operator that it stands for would
    run as a Triton kernel. Not in float32, where products take longer than launches."""
    fits = x.dtype in (torch.float16, torch.bfloat16) and all(widths[name] <= widest[name] for name in widest)
    return fits and all(choose(operator, x) == "triton" for operator in instead_of)
