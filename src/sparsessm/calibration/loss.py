"""The loss of a model on windows: what perplexity, prices and the choice of blocks have in common."""

ROWS = 256  # rows of logits alive at a time: 50 MB for a vocabulary of 50,000
