"""Recurrences whose state is a matrix, or that mix nonlinearly over time."""
