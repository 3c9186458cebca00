"""Datasets that name the file when something in it is wrong."""
