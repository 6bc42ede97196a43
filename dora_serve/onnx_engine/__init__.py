"""An exported base with adapter slots, in ONNX Runtime: adapter files come and go while it runs."""
