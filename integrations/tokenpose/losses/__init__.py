"""What pose networks learn from: targets, and the losses on them."""
