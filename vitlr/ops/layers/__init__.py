"""What layers compute: one file an operation, with its specification in plain torch."""
