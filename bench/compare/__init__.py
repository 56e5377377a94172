"""How good what comes out is, beside other methods."""
