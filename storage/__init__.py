"""How it lies on disk: objects that appear whole or not at all, and the manifests that name them.

Read in this order: errors, durable, store, manifest, column, then corpus, embeddings, tokens and
negatives, which are four kinds of column. Nothing here knows of torch, FAISS or a teacher.
"""
