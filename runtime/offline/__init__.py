"""`qcn-run BUILD --batch FILE`: the server's API over the lines of a file, without a network."""
