"""How it lies on disk: objects that appear whole or not at all, and the manifests that name them.

Read in this order: errors, durable, store, manifest, column, then corpus, embeddings, tokens and
negatives, which are four kinds of column. Inventory, upkeep and difference look after what is there.
Nothing here knows of torch, FAISS or a teacher.
"""
