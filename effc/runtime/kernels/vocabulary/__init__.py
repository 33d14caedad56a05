"""The two likeliest tokens and the log-sum-exp of logits that are never written out."""
