"""The networks: backbones, heads and what they are built from."""
