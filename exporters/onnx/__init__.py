"""A Hugging Face folder as ONNX graphs, and the proof that they compute what it computes."""
