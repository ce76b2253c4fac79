"""A decoder in ONNX Runtime: token trees, passes, dynamic batching."""
