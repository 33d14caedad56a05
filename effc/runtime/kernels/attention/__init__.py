"""Attention of a few queries over a cache that may be coded."""
