"""`--emit onnx`: a graph for one sequence, custom ops as functions of standard ones, caches as inputs and outputs."""
