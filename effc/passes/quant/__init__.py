"""Quantization of weights with the help of text: statistics, methods, rules, budgets."""
