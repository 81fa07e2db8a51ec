"""Triton's interpreter made quick enough for tests. Imported only where TRITON_INTERPRET is 1."""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def quick_calls() -> None:
    """A kernel's call of another function costs what it computes.

    The interpreter of Triton 3.7 looks through Triton's modules again at every such call, for what
    the launch has replaced already or an earlier call has (its replacements in `tl.core` last):
    several milliseconds each, most of the time of a test. Here it looks once.
    """
    ready: dict[Any, Any] = {}
    searched = []

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn not in ready:
            if not searched and tl.core in self.fn.__globals__.values():
                interpreter._patch_lang(self.fn)
                searched.append(True)
            ready[self.fn] = self.rewrite()
        return ready[self.fn](*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
