"""Attention control for diffusion UNets: while a target is sampled, chosen attention sites read the source's rows.

Knows torch, einops and diffusers' attention dispatch; never prompts, schedulers, images or pipelines. To add a controller: a
file with a frozen dataclass that has `name`, `paper` and `routes()`, and a row in `CONTROLLERS`.
"""

from __future__ import annotations

from typing import Any

from attention_control.errors import ControlError
from attention_control.masactrl import MasaCtrl
from attention_control.plain import NoControl
from attention_control.processor import RoutedProcessor
from attention_control.routes import Route
from attention_control.session import Controller, Session, controlled
from attention_control.sites import AttentionSite, list_sites, select_sites
from attention_control.streams import StreamRow, Streams

CONTROLLERS: dict[str, type[Any]] = {
    "none": NoControl,
    "masactrl": MasaCtrl,
}

__all__ = [
    "CONTROLLERS",
    "AttentionSite",
    "ControlError",
    "Controller",
    "MasaCtrl",
    "NoControl",
    "Route",
    "RoutedProcessor",
    "Session",
    "StreamRow",
    "Streams",
    "controlled",
    "list_sites",
    "select_sites",
]
