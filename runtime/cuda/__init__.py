"""The CUDA side of the runtime: cubins, memory and graphs through the driver API; `cuda-bindings` is all it needs."""
