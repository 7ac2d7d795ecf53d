"""Four synthetic tasks over one prompt, graded exactly: their data, and scores of what a stack answers."""
