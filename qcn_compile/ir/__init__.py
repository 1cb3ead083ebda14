"""Graph IR: typed SSA over symbolic token counts, one op table, text form, verifier, interpreter."""
