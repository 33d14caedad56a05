"""Stretches of a program as one native call: a list of small ops that threads run in stages."""
