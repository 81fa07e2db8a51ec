"""Which earlier tokens a query sees, as far as positions alone decide it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pattern:
    """A query sees itself and the `window - 1` tokens before it; with `window=None` all of them."""

    window: int | None = None

    def seen(self, context: int) -> float:
        """The tokens that a query sees, on average over the positions 1..context."""
        near = self.kept(context)
        return (near * (near + 1) / 2 + (context - near) * near) / context

    def kept(self, context: int) -> int:
        """S: the tokens that a cache keeps for sequences of at most `context` tokens."""
        return context if self.window is None else min(context, self.window)


def pattern_problem(lender: Pattern, borrower: Pattern) -> str | None:
    """Why a cache for the first does not serve the second, in a sentence; None if it does."""
    if lender.window is None or (borrower.window or lender.window + 1) <= lender.window:
        return None
    sees = "every token" if borrower.window is None else f"{borrower.window} tokens"
    return f"the borrower sees {sees} and the lender keeps {lender.window}"
