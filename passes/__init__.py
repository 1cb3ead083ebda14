"""The passes. One file is one pass, one pipeline name and one test file. `qcn_compile/pipeline.py` orders them."""
