"""Peak resident memory of a few training steps, each variant in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from dsfast.bench.peers import PEERS, PeerTraining
from dsfast.bench.workload import random_batch
from dsfast.config import Config
from dsfast.errors import UserError
from dsfast.files import Json
from dsfast.model import DeepseekV3
from dsfast.train import Trainer

IDLE = "import torch"
"""A process that has imported torch and does nothing: what every variant stands on."""
STEPS = 3

_TRAIN = "from dsfast.bench.memory import train_as_asked; train_as_asked()"
# The kernel's own high-water mark. getrusage's survives exec: a small child of a large parent would show the parent's.
_STATUS = Path("/proc/self/status")
_PRINT_PEAK = f"print(next(line.split()[1] for line in open('{_STATUS}') if line.startswith('VmHWM')))"


def check_measurable() -> None:
    """Raises UserError where the system does not tell a process's peak."""
    if not _STATUS.exists():
        raise UserError(f"--memory reads {_STATUS}, which this system does not have")


def peak_memory(
    config: Config, batch: int, length: int, variants: Iterable[str], progress: Callable[[str], None]
) -> Json:
    """`memory`: IDLE, "dsfast" and `variants` (peers) -> bytes; `memory_failed`: those of them whose process failed -> why.
    `progress` is told what comes next."""
    request = {"config": config.to_dict(), "batch": batch, "length": length}
    peaks, failed = {}, {}
    for variant in (IDLE, "dsfast", *variants):
        progress(f"memory of {variant}")
        program = IDLE if variant == IDLE else _TRAIN
        command = [sys.executable, "-c", f"{program}; {_PRINT_PEAK}"]
        asked = json.dumps({**request, "variant": variant})
        child = subprocess.run(command, input=asked, capture_output=True, text=True)
        if child.returncode:
            said = child.stderr.strip().splitlines()
            failed[variant] = f"its process ended with status {child.returncode}: {said[-1] if said else 'no word'}"
        else:
            peaks[variant] = int(child.stdout.split()[-1]) * 1024
    return {"memory": peaks, "memory_failed": failed}


def train_as_asked() -> None:
    """Take a few steps of the variant that standard input names."""
    request = json.load(sys.stdin)
    config, variant = Config.from_dict(request["config"]), request["variant"]
    if variant == "dsfast":
        training = Trainer(config)
    else:
        torch.manual_seed(config.seed)
        training = PeerTraining(PEERS[variant], DeepseekV3(config.model), config.train)
    rows = random_batch(config, request["batch"], request["length"])
    for _ in range(STEPS):
        training.step(*rows)
