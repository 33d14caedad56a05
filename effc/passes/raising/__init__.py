"""Traced primitives -> transformer ops, by what values compute, never by what they are called.

Each file finds candidates by the ops around one anchor (a gather, a dot, an rsqrt, a softmax), runs
the candidate on numbers, and raises it only if it agrees with the transformer op it would become.
"""
