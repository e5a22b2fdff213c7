"""What the data says: the walk over the blocks, and what an error costs the loss.

Stage 1 of the flow.

    walk.py      the one walk: opens a block, hands it out, takes all windows through it, closes it
    paired.py    taps for observers that compare the model with the dense one
    visit.py     in which order the targets are looked at, changed or as they are
    prices.py    what an error in an output row costs the loss, from one backward pass
    loss.py      the loss itself, some rows of logits at a time
    progress.py  how far a stage is
"""
