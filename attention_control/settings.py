"""Types of settings that controllers share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from attention_control.sites import check_selector, check_step

Step = Annotated[int | float, BeforeValidator(check_step)]
"""A whole number of steps, or a share of all."""
Sites = Annotated[str, BeforeValidator(lambda n: str(n) if type(n) is int else n), AfterValidator(check_selector)]
"""A selector of attention sites."""
Share = Annotated[float, Field(ge=0, le=1)]


def _mask(given: Any) -> Any:
    if given is None or not isinstance(given, bool | int | float | dict):
        return given
    raise ValueError("should be a mask: the path of a picture, or an array (height, width) of values from 0 to 1")


Mask = Annotated[Any, BeforeValidator(_mask)]
"""A picture's path, a PIL picture, an array or a tensor (h, w); white is 1."""


def _phrases(given: Any) -> Any:
    if isinstance(given, str):
        return given
    if isinstance(given, list | tuple) and any(given) and all(isinstance(text, str) for text in given):
        return tuple(given)
    raise ValueError("should be one text that stands in every target prompt, or a list with one text for each")


Phrases = Annotated[str | tuple[str, ...], BeforeValidator(_phrases)]
"""Words of the target prompts: one text, or one for each prompt, empty for none."""
