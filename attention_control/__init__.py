"""Attention control for diffusion UNets: while a target is sampled, chosen attention sites read the source's rows.

Knows torch, einops and diffusers' attention dispatch; never prompts, schedulers, images or pipelines. To add a controller: a
file with a frozen dataclass that has `name`, `paper` and `program(run)`, and a row in `CONTROLLERS`.
"""

from __future__ import annotations

from typing import Any

from attention_control.compose import Compose
from attention_control.cross_maps import CrossMaps
from attention_control.errors import ControlError
from attention_control.features import FeatureCopy
from attention_control.masactrl import MasaCtrl
from attention_control.object_add import ObjectAdd
from attention_control.plain import NoControl
from attention_control.plug_and_play import PlugAndPlay
from attention_control.portrait import Portrait
from attention_control.processor import CrossProcessor, RoutedProcessor
from attention_control.prompt_to_prompt import PromptToPrompt
from attention_control.reference_cache import ReferenceCache
from attention_control.routes import Route
from attention_control.run import Blend, CrossEdit, Program, Run
from attention_control.session import Controller, Session, controlled, recording
from attention_control.sites import AttentionSite, list_sites, select_sites
from attention_control.streams import StreamRow, Streams
from attention_control.structure import Structure
from attention_control.style_aligned import StyleAligned
from attention_control.words import Words

CONTROLLERS: dict[str, type[Any]] = {
    "none": NoControl,
    "masactrl": MasaCtrl,
    "structure": Structure,
    "prompt_to_prompt": PromptToPrompt,
    "plug_and_play": PlugAndPlay,
    "style_aligned": StyleAligned,
    "portrait": Portrait,
    "object_add": ObjectAdd,
    "compose": Compose,
}

__all__ = [
    "CONTROLLERS",
    "AttentionSite",
    "Blend",
    "Compose",
    "ControlError",
    "Controller",
    "CrossEdit",
    "CrossMaps",
    "CrossProcessor",
    "FeatureCopy",
    "MasaCtrl",
    "NoControl",
    "ObjectAdd",
    "PlugAndPlay",
    "Portrait",
    "Program",
    "PromptToPrompt",
    "ReferenceCache",
    "Route",
    "RoutedProcessor",
    "Run",
    "Session",
    "StreamRow",
    "Streams",
    "Structure",
    "StyleAligned",
    "Words",
    "controlled",
    "list_sites",
    "recording",
    "select_sites",
]
