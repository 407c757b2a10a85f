"""A model: its folder, hashes, loading, encoding, layers, mixing, speed, portable and ONNX forms.

May import reading, params, outcome, vectors and storage.
"""
