"""The verdict before any work: what a model needs on given hardware, how fast it is, what to choose. No torch."""
