"""Questions to a model and what its answers are worth: probes, similarity, recall."""

from dsfast.evaluate.probes import ProbeResult, ask, check_lengths, continue_greedily
from dsfast.evaluate.recall import Recall, check_taught, measure_recall, measure_taught, wilson_interval
from dsfast.evaluate.similarity import Similarity, exact_match, similarity

__all__ = [
    "ProbeResult",
    "Recall",
    "Similarity",
    "ask",
    "check_lengths",
    "check_taught",
    "continue_greedily",
    "exact_match",
    "measure_recall",
    "measure_taught",
    "similarity",
    "wilson_interval",
]
