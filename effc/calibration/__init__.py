"""Thresholds chosen with a guarantee: Learn-then-Test, and what a text loses by another."""
