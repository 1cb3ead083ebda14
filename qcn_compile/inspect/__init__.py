"""`qcn-inspect`: what is in a build, what was decided, and why. Needs neither torch nor TVM."""
