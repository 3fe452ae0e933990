"""Training: optimizer, checkpoints, the loop."""

from dsfast.errors import Interrupted
from dsfast.train.checkpoint import load_checkpoint
from dsfast.train.loop import StepReport, Trainer, TrainingError, TrainResult
from dsfast.train.optimizer import build_optimizer, learning_rate_scale

__all__ = [
    "Interrupted",
    "StepReport",
    "TrainResult",
    "Trainer",
    "TrainingError",
    "build_optimizer",
    "learning_rate_scale",
    "load_checkpoint",
]
