"""Look for what keeps edits from running: versions, devices, known bad combinations, the embedded model."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

from easyinv_edit.errors import first_line
from easyinv_edit.result import versions


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked at, whether it is good, and what was found or what to do."""

    what: str
    good: bool
    found: str


def examine() -> list[Finding]:
    """Every check in order; none raises."""
    checks: list[tuple[str, Callable[[], str]]] = [
        ("versions", lambda: ", ".join(f"{name} {number}" for name, number in versions().items())),
        ("torchvision", _torchvision),
        ("devices", _devices),
        ("hub", _hub),
        ("embedded model", _embedded),
    ]
    return [_try(what, check) for what, check in checks]


def _try(what: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(what, True, check())
    except Exception as error:  # a doctor reports every illness instead of dying of it
        return Finding(what, False, first_line(error))


def _torchvision() -> str:
    """A torchvision built for another torch breaks the import of diffusers' pipelines; none at all is fine."""
    try:
        found = version("torchvision")
    except PackageNotFoundError:
        return "not installed, not needed"
    wanted = next((r for r in requires("torchvision") or [] if r.startswith("torch=")), "torch")
    try:
        import torchvision  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
    except Exception as error:
        raise RuntimeError(
            f"torchvision {found} needs {wanted} and fails to import ({error}); run pip uninstall torchvision"
        ) from error
    return f"{found}, imports"


def _devices() -> str:
    import torch

    found = [f"cpu ({torch.get_num_threads()} threads)"]
    found += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    found += ["mps"] if torch.backends.mps.is_available() else []
    return ", ".join(found)


def _hub() -> str:
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    return (
        "offline by HF_HUB_OFFLINE: only models on disk"
        if offline
        else "online if the network allows; the embedded model needs none"
    )


def _embedded() -> str:
    from easyinv_edit.pipeline import EditPipeline

    backbone = EditPipeline.embedded().backbone
    height, width = backbone.native_size
    parameters = sum(p.numel() for p in backbone.network.parameters())
    return f"loads: {height} x {width} pixels, UNet of {parameters / 1e6:.1f} M parameters"
