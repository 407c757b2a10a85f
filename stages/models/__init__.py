"""A model: its folder, its hashes, loading, encoding, packing, speed, portable and ONNX forms.

May import reading, params, outcome, vectors and storage.
"""
