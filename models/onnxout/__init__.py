"""Strategies applied to ONNX files: a model for each rank, and annotations of the whole model."""
