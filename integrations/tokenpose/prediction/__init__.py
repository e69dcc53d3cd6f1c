"""Key points of your own images and videos."""
