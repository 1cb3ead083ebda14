"""`qcn-bench`: a load generator for any OpenAI-compatible server. Standard library alone."""
