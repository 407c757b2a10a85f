"""Nearest rows: FAISS indexes, the exact self-join, and the rules by which a neighbour is no negative.

May import models, reading, params, outcome, vectors and storage.
"""
