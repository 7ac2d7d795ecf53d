"""Four synthetic tasks over one prompt, with answers that can be graded exactly, to train and judge adapters on."""
