"""The CPU backend: TVM kernels, their lowering and packing, and the small C host that runs them. Light to import."""
