"""Between what a network sees and gives and the pixels of an image: geometry, mirroring, decoding, export."""
