"""One file a command of `vitlr`: what it takes, what it does, what it answers."""
