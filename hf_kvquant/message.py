"""Shortens values for messages: users may pass any value, of any size and depth; a message shows a line or two."""

from __future__ import annotations

import reprlib

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 100
_short.maxlist = _short.maxtuple = _short.maxdict = 8


def told(value: object) -> str:
    """`repr` of the value, shortened if it is long."""
    try:
        return _short.repr(value)
    except ValueError:
        return "an integer of thousands of digits"
