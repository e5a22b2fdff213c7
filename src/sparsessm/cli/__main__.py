"""`python -m sparsessm.cli`: the `sparsessm` command where its script is not on the path."""

from . import main

main()
