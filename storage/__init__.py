"""How it lies on disk: objects that appear whole or not at all, and the manifests that name them.

Read in this order: errors, durable, store, manifest, column, corpus, and then the kinds of column:
embeddings, tokens, negatives, mixes, readings. The room `upkeep` looks after what is there.
Nothing here knows of torch, FAISS or a teacher.
"""
