"""What is asked: the recipe, its fields, and one rule for each matrix or size for each kind of unit.

Stage 0 of the flow.

    recipe.py   the recipe: flags, YAML, the record of a result
    fields.py   fields that a recipe and its rules share, and what fits together
    rules.py    recipe and model -> a rule for each matrix
    sizes.py    recipe and model -> how many whole units stay
"""
