"""What runs a network on segments of audio: Keras or LiteRT."""
