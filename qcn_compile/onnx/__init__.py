"""`--emit onnx`: the unfused graph for one sequence, in standard ONNX ops, caches as inputs and outputs."""
