"""The suite: train, verify, question and time the 500K model; `python -m dsfast.suite`."""
