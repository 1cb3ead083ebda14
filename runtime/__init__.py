"""The runtime: artifact in, tokens out. Imports neither torch nor triton nor transformers, and compiles nothing."""
