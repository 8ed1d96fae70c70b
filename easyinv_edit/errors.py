"""Every error and warning this package raises on purpose.

EasyInvError                  root: what went wrong, what is allowed, what to do
├── InputError                the user gave something unusable; the command line exits with 2
│   ├── ImageError            an image cannot be read or used
│   ├── RecipeError           a recipe has problems; all of them, each with its place
│   ├── ModelError            a model folder cannot be loaded or is of an unknown family
│   ├── TrajectoryError       an inversion file is unusable, or belongs to another model, schedule or size
│   └── ScheduleError         a noise schedule that a first-order deterministic sampler cannot serve
└── NonFiniteError            a latent became NaN or infinite; names method, level and remedy
EasyInvWarning                going on is right, but the user should know
"""

from __future__ import annotations


class EasyInvError(Exception):
    """Root of this package's errors."""


class InputError(EasyInvError, ValueError):
    """Something the user gave cannot be used."""


class ImageError(InputError):
    """An image cannot be read or used."""


class ModelError(InputError):
    """A model cannot be loaded or is of a family this package does not know."""


class TrajectoryError(InputError):
    """An inversion file cannot be read, or does not fit the model, schedule or size it is used with."""


class RecipeError(InputError):
    """A recipe has problems. `problems` holds every one of them, each a line `file:line:column: key: what is wrong`."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class ScheduleError(InputError):
    """A noise schedule that cannot be sampled and inverted by one linear step per level."""


class NonFiniteError(EasyInvError, ArithmeticError):
    """A latent became NaN or infinite."""


class EasyInvWarning(UserWarning):
    """Something the user should know although the work goes on."""


def first_line(error: BaseException) -> str:
    """The first line of another library's error, to stand in one of ours, or its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
