"""Softmax attention: heads, patterns, scores, caches."""
