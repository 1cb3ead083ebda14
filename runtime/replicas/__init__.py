"""Several servers of one build behind one address, placed, watched and restarted by Ray."""
