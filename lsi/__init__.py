"""The algorithm: tensors in, tensors out. Imports torch, and nothing of Ray, fsspec or the pipeline."""
