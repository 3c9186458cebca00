"""The networks: backbones, heads and their building blocks."""
