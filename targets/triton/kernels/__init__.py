"""Triton kernels by theme. Importing a module here imports Triton; `families` lists them without it."""
