"""Room for the frames of Python calls.

CPython 3.11 and later keep frames in pieces of 16 KiB, and a call that finds the last piece full
maps a new one, which goes back to the system when the call returns. A loop that happens to run at
that depth then maps and unmaps memory with every call, some 25 µs of the kernel's time. The frame
of a compiled model's graph alone fills a third or half of a piece, so under a compiler that is
likely.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import FunctionType
from typing import ParamSpec, TypeVar, cast

__all__ = ["with_room_for_frames"]

_Inputs = ParamSpec("_Inputs")
_Result = TypeVar("_Result")

_PIECE = 2**14 // 8  # words


def with_room_for_frames(function: Callable[_Inputs, _Result]) -> Callable[_Inputs, _Result]:
    """Let ``function``, and what it calls, begin in a piece of its own with 15 KiB to spare."""

    @wraps(function)
    def run(*args: _Inputs.args, **kwargs: _Inputs.kwargs) -> _Result:
        return function(*args, **kwargs)

    # A frame that fits in no piece gets one of twice the size.
    wrapper = cast(FunctionType, run)
    wrapper.__code__ = wrapper.__code__.replace(co_stacksize=_PIECE)
    return run
