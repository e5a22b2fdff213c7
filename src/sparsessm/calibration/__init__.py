"""What the data says: the walk over the blocks, and what an error costs the loss.

Stage 1 of the flow.

    walk.py     all windows together, block after block, feeding the observers
    prices.py   what an error in an output row costs the loss, from one backward pass
    loss.py     the loss itself, some rows of logits at a time
"""
