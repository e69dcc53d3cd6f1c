"""The networks, by name: TokenPose, SDPose and PPT, and two convolutional models to compare with."""
