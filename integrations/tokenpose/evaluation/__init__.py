"""How good predictions are: similarity to the truth, average precision over a data set, and the command for both."""
