"""Faults of other libraries, worked round."""
