"""Slow, obvious versions of what the packages do fast. Tests compare against these."""
