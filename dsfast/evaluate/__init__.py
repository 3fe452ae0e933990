"""Questions to a model and what its answers are worth: probes, similarity, recall."""

from dsfast.evaluate.probes import ProbeResult, ask, check_lengths
from dsfast.evaluate.recall import Recall, check_taught, measure_taught
from dsfast.evaluate.similarity import exact_match, similarity

__all__ = [
    "ProbeResult",
    "Recall",
    "ask",
    "check_lengths",
    "check_taught",
    "exact_match",
    "measure_taught",
    "similarity",
]
