"""Training: optimizer, checkpoints, the loop."""

from dsfast.errors import Interrupted
from dsfast.train.checkpoint import load_checkpoint
from dsfast.train.loop import Trainer, TrainingError, TrainResult
from dsfast.train.optimizer import build_optimizer

__all__ = [
    "Interrupted",
    "TrainResult",
    "Trainer",
    "TrainingError",
    "build_optimizer",
    "load_checkpoint",
]
