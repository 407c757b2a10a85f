"""What `embed` needs beside a model: the interface to a teacher, reuse, sharing, drift, rounding, imports.

May import models, reading, params, outcome, vectors and storage; `interface` imports no torch.
"""
