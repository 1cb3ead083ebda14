"""The GPU target: Triton kernels compiled ahead of time to cubins, on a machine that needs no GPU."""
