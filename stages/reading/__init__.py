"""Files in: globs, lines, corpus files, labelled files, evaluation sets, documentation of packages.

May import params, outcome, vectors and storage, and no other room.
"""
