"""The front end: a checkpoint or a config in, Graph IR and a weight source out."""
