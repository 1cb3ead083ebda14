"""What hardware is, what an op costs on it, and how kernels are written for it."""
