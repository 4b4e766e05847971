"""Frames: a loop at any depth of calls maps no memory at each call."""

import resource
import sys

import pytest

from kernels.frames import with_room_for_frames

CALLS = 300


def _leaf(x: int) -> int:
    return x


def _loop() -> int:
    """Page faults of many short calls."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(CALLS):
        _leaf(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


_roomy_loop = with_room_for_frames(_loop)


def _at_depth(depth: int, function) -> int:
    return function() if depth == 0 else _at_depth(depth - 1, function)


def _most_faults(function) -> int:
    return max(_at_depth(depth, function) for depth in range(400))


def test_no_depth_of_calls_maps_memory_at_each_call():
    assert _most_faults(_roomy_loop) < CALLS // 2


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="as measured on CPython 3.11")
def test_without_room_some_depth_does():
    assert _most_faults(_loop) >= CALLS


def test_arguments_result_and_name_are_the_functions():
    def difference(x: int, *, y: int) -> int:
        """Of two numbers."""
        return x - y

    roomy = with_room_for_frames(difference)
    assert roomy(5, y=2) == 3
    assert (roomy.__name__, roomy.__doc__) == ("difference", "Of two numbers.")
