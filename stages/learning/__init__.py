"""Training: objectives, candidates, batches, mixes, the student, the loop, ranks, checkpoints, judges.

May import models, reading, params, outcome, vectors and storage.
"""
