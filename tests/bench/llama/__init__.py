"""The other side of the CPU benchmark: these files run in the environment of llama-cpp-python, not in ours."""
