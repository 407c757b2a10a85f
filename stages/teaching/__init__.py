"""What `embed` needs beside a model: the interface to a teacher, an API, reuse, sharing, drift, imports.

May import models, reading, params, outcome, vectors and storage; `interface` imports no torch.
"""
