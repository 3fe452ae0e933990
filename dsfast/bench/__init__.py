"""Timing: operators, whole training steps and generation, against peers in the same run."""
