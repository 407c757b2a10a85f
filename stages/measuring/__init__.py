"""Measuring a model: its details, the teacher's documents, tasks of mteb, search.

May import models, reading, params, outcome, vectors and storage.
"""
