"""One exported base on which ONNX Runtime hot-swaps adapters: slots in the graph, and adapter files that fill them."""
