"""Workarounds for bugs in other libraries."""
