"""`python -m vitlr`, which is what `torchrun -m vitlr` starts several of."""

from vitlr.cli.app import main

main()
