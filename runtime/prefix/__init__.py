"""Prefix cache of the hybrid model: KV pages by reference, DeltaNet states by snapshot, one radix tree over both."""
