"""Workarounds for faults of other libraries."""
