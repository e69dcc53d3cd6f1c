"""Image classification: the DeiT recipe for any timm model, plain or in cycles, from one CPU to many nodes."""
