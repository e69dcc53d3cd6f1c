"""What every long training needs and none should write again: order, seeds, checkpoints, resume, progress, records."""
