"""What a model costs, how fast it is, how right it is."""
