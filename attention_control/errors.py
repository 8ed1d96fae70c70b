"""The one error of attention control."""

from __future__ import annotations


class ControlError(ValueError):
    """A controller cannot be used as asked; the message says what was given, what is allowed and what to do."""
