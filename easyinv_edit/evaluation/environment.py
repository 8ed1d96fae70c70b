"""Where a benchmark ran and when: what its numbers are of."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from easyinv_edit.result import versions, write_text

FILE = "environment.json"


def machine(device: torch.device) -> dict[str, Any]:
    """The machine and the software that numbers are of."""
    return {
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def started(folder: Path, device: torch.device, dtypes: list[str]) -> dict[str, Any]:
    """Write environment.json at the beginning of a run; one that goes on keeps when it was started first."""
    before = known(folder)
    content: dict[str, Any] = {
        **machine(device),
        "dtypes": dtypes,
        "commit": _commit(),
        "started": before.get("started", _now()),
        "resumed": [*before.get("resumed", []), *([_now()] if before else [])],
        "finished": None,
    }
    _write(folder, content)
    return content


def finished(folder: Path, content: Mapping[str, Any], results: int) -> None:
    """Write when the run was done, and how many results it has."""
    _write(folder, {**content, "finished": _now(), "results": results})


def known(folder: Path) -> dict[str, Any]:
    """What environment.json holds; nothing where it is not there or not whole."""
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(folder: Path, content: Mapping[str, Any]) -> None:
    write_text(folder / FILE, json.dumps(content, indent=2) + "\n")


def _cpu_name() -> str:
    """The processor as Linux names it, else as Python does."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text(encoding="utf-8").splitlines() if told.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _commit() -> str | None:
    """The commit of the checkout this package is run from, None where it is installed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    asked = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
