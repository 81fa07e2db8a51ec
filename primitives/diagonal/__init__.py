"""Recurrences whose state decays channel by channel."""
