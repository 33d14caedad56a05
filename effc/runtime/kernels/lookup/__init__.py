"""Rows of a table of codes."""
