"""Mixers over channels: one token at a time."""
