"""Weights as files: published checkpoints, ours, and from one to the other."""
