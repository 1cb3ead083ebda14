"""Benchmarks: each runs from one command, prints machine, versions and commit, and judges nothing."""
