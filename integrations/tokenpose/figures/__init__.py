"""Drawn figures with exact key points, for a training without a download."""
