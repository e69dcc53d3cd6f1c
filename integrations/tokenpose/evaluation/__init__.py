"""How good predictions are: similarity to the truth, and average precision over a data set."""
