"""`python -m sparsessm`: the `sparsessm` command where its script is not on the path."""

from .cli import main

main()
