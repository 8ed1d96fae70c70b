"""What commands share: where they may write, what they print, and which warnings reach the user. Imports nothing heavy."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and no text, only errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


def shipped(group: str = "recipes") -> list[Path]:
    """The YAML files that come with this package: installed inside it, in a checkout beside it."""
    here = Path(__file__).parent
    homes = (here / "configs" / group, here.parent / "configs" / group)
    return sorted(next((home for home in homes if home.is_dir()), homes[0]).glob("*.yaml"))


def config_file(group: str, name: str) -> Path:
    """A file as it is, or the shipped one of that name."""
    found = {path.stem: path for path in shipped(group)}
    return found[name] if name in found and not Path(name).exists() else Path(name)


def require_writable(folder: Path) -> None:
    """Fail before the work, not after it; the folder itself is made when there is something to put into it."""
    from easyinv_edit.errors import InputError

    there = next(parent for parent in (folder, *folder.absolute().parents) if os.path.lexists(parent))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        reason = "permission denied" if there.is_dir() else f"{there} is no folder"
        raise InputError(f"{folder}: cannot be written ({reason}); choose another output folder")


def bars(quiet: bool, json_: bool) -> bool:
    """Whether to draw progress bars: to a person at a terminal."""
    return sys.stderr.isatty() and not (quiet or json_)


def show(facts: Any, quiet: bool, json_: bool, text: Callable[[Any], str]) -> None:
    """Print what a command found: as JSON, as text, or not at all."""
    if json_:
        typer.echo(json.dumps(facts, indent=2))
    elif not quiet:
        typer.echo(text(facts))


def settle(quiet: bool) -> None:
    """Keep other libraries' bars and notices off the terminal; our own warnings are one line each, each said once."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from easyinv_edit.errors import EasyInvWarning

    for logging in (transformers_logging, diffusers_logging):
        logging.disable_progress_bar()
        logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    warnings.simplefilter("ignore" if quiet else "always", EasyInvWarning)
    said: set[str] = set()

    def show_once(message: Warning | str, *_args: Any, **_kwargs: Any) -> None:
        if str(message) not in said:
            said.add(str(message))
            typer.echo(f"warning: {message}", err=True)

    warnings.showwarning = show_once
