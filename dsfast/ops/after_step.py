"""What a training step does when its parameters are updated: the routers' biases, and what is kept of the step.

Small enough to be nothing but launches on a GPU, so there each is one; there is no C++ for it. They run as `adamw` is chosen to.

L routers, E experts, P places of steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsfast.ops import triton
from dsfast.ops.device_numbers import expect_on_device, or_tensor
from dsfast.ops.dispatch import choose
from dsfast.ops.library import define, expect_contiguous, expect_dtype, expect_shape

MOST_EXPERTS = 2048
"""That the Triton kernel of `update_bias` takes."""


@torch.no_grad()
def update_bias(biases: Sequence[Tensor], loads: Tensor, speed: float, clip_scale: float | Tensor = 1.0) -> None:
    """Balance the experts without a loss (DeepSeek-V3, arXiv 2412.19437, section 2.1.2), in place.

    biases: of each router, [E] float32; loads [L, E] int64, tokens of each expert. The bias of experts below the router's mean
    load rises by `speed`, that of experts above it falls. Nothing changes where clip_scale, which may be float32 [] on the
    device (`ops.grad_clip`), is not finite. Raises ValueError or TypeError for what does not fit together.
    """
    expect_shape("update_bias", "loads", loads, len(biases), "E")
    for bias in biases:
        expect_shape("update_bias", "biases", bias, loads.size(1))
        expect_dtype("update_bias", torch.float32, loads.device, biases=bias)
        expect_contiguous("update_bias", biases=bias)
    expect_dtype("update_bias", torch.int64, loads.device, loads=loads)
    expect_on_device("update_bias", loads.device, clip_scale=clip_scale)
    if not biases:
        return
    experts = loads.size(1)
    refused = f"the Triton kernel takes up to {MOST_EXPERTS} experts, got {experts}" if experts > MOST_EXPERTS else ""
    if choose("adamw", biases[0], not_triton=refused) == "reference":
        update_bias_reference(biases, loads, speed, clip_scale)
    else:
        torch.ops.dsfast.update_bias(biases, loads, speed, *or_tensor(clip_scale))


def update_bias_reference(biases: Sequence[Tensor], loads: Tensor, speed: float, clip_scale: float | Tensor) -> None:
    updated = torch.as_tensor(clip_scale, device=loads.device).isfinite()
    below = loads.sum(1, keepdim=True) - loads * loads.size(1)  # E times how far: integers, as a mean would be rounded
    for bias, step in zip(biases, speed * updated * below.sign(), strict=True):
        bias += step


@torch.no_grad()
def record_step(
    place: Tensor, update: Tensor, measured: Tensor, loads: Tensor, loss: Tensor, norm: Tensor, lr_scale: Tensor,
    clip_scale: Tensor, load: Tensor,
) -> None:  # fmt: skip
    """Keep what a step measured, and count it, in device memory.

    Row `place` of measured [P, 4] float64 becomes (loss, norm, lr_scale, 1 if clip_scale is finite else 0), that of loads
    [P, L, E] int64 becomes load [L, E]; place [1] int64 moves on, and update [] int64, the number of the next update, where
    clip_scale is finite. loss [] of any floating dtype, norm and lr_scale float64 [], clip_scale float32 []. A place that is
    not in 0 .. P - 1 is an error on the CPU; elsewhere, where looking would wait for the device, nothing is kept.
    """
    expect_shape("record_step", "measured", measured, "P", 4)
    expect_shape("record_step", "loads", loads, measured.size(0), *load.shape)
    device = measured.device
    expect_dtype("record_step", torch.int64, device, place=place, update=update, loads=loads, load=load)
    expect_dtype("record_step", torch.float64, device, measured=measured, norm=norm, lr_scale=lr_scale)
    expect_dtype("record_step", torch.float32, device, clip_scale=clip_scale)
    expect_contiguous("record_step", measured=measured, loads=loads)
    arguments = (place, update, measured, loads, loss, norm, lr_scale, clip_scale, load)
    if choose("adamw", clip_scale) == "reference":
        record_step_reference(*arguments)
    else:
        torch.ops.dsfast.record_step(*arguments)


def record_step_reference(place, update, measured, loads, loss, norm, lr_scale, clip_scale, load) -> None:
    updated = clip_scale.isfinite()
    measured.index_copy_(0, place, torch.stack([loss.double(), norm, lr_scale, updated.double()])[None])
    loads.index_copy_(0, place, load[None])
    place.add_(1)
    update.add_(updated)


def _update_bias_cpu(biases, loads, speed, clip_scale, device_clip_scale) -> None:
    update_bias_reference(biases, loads, speed, clip_scale if device_clip_scale is None else device_clip_scale)


define(
    "update_bias(Tensor(a!)[] biases, Tensor loads, float speed, float clip_scale, Tensor? device_clip_scale) -> ()",
    cpu=_update_bias_cpu,
    fake=lambda *_: None,
    cuda=triton.launcher("after_step", "update_bias"),
)
define(
    "record_step(Tensor(a!) place, Tensor(b!) update, Tensor(c!) measured, Tensor(d!) loads, Tensor loss, Tensor norm,"
    " Tensor lr_scale, Tensor clip_scale, Tensor load) -> ()",
    cpu=record_step_reference,
    fake=lambda *_: None,
    cuda=triton.launcher("after_step", "record_step"),
)
