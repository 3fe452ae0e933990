"""`bench gpu`: every operator, the training step and generation on a GPU, beside what else a user could take there.

Each part runs in a process of its own (`run` starts `child`), so that a part that hangs or breaks the GPU's context costs the
others nothing. What is timed has been checked first (`operators`); peers that are missing, refuse or fail are named.
"""
