"""From prompts, pictures and adapters to the denoiser of some rows: what each row is conditioned on, and moves away from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
from torch import Tensor

from easyinv_edit.choices import nearest
from easyinv_edit.conditioning import IMAGE, TEXT, Conditioning, Framing
from easyinv_edit.denoiser import Denoiser, Prompt
from easyinv_edit.errors import InputError
from easyinv_edit.images import Fit
from easyinv_edit.schedule import NoiseSchedule
from easyinv_edit.trajectory import Trajectory


class Conditions(TypedDict, total=False):
    """What the user's own adapters are given, by diffusers' names.

    ip_adapter_image: a picture, or a list with one per loaded IP-Adapter; control_image: a picture for the ControlNet as its
    preprocessor made it, or a list with one per net, stretched to the size of the edit; controlnet_conditioning_scale: how
    strongly, or a list of that.
    """

    ip_adapter_image: Any
    control_image: Any
    controlnet_conditioning_scale: float | list[float]


ALLOWED = tuple(Conditions.__annotations__)


def check(conditions: Mapping[str, Any]) -> None:
    """Raise TypeError for an unknown argument, as Python does, and InputError for a scale without a picture."""
    if wrong := [name for name in conditions if name not in ALLOWED]:
        raise TypeError(f"unknown argument {wrong[0]!r}{nearest(wrong[0], ALLOWED)}; adapters take {', '.join(ALLOWED)}")
    if conditions.get("controlnet_conditioning_scale") is not None and conditions.get("control_image") is None:
        raise InputError("controlnet_conditioning_scale: there is no control_image; give one, or leave the scale out")


def given_parts(backbone: Any, prompt: Prompt, conditions: Conditions, size: tuple[int, int]) -> dict[str, Tensor]:
    """The parts of one row's conditioning that are tensors from the start; size: (height, width) of the picture.

    They are what a trajectory must keep of its source beside the prompt's text.
    """
    check(conditions)
    scale = conditions.get("controlnet_conditioning_scale")
    pictures = {name: conditions.get(name) for name in ("ip_adapter_image", "control_image")}
    parts = backbone.guests(size, **pictures, scale=1.0 if scale is None else scale)
    text = prompt.parts() if isinstance(prompt, Conditioning) else {}
    return {**{name: part for name, part in text.items() if name in TEXT}, **parts}


@dataclass(frozen=True)
class Row:
    """One row to be conditioned. framing: how its picture came to its size; given: from `given_parts`."""

    prompt: Prompt
    framing: Framing | None = None
    given: Mapping[str, Tensor] = field(default_factory=dict)


def rows_of(trajectory: Trajectory) -> list[Row]:
    """The source rows of a trajectory, as they were inverted."""
    rows = range(trajectory.latents.shape[1])
    given = [{name: part[r : r + 1] for name, part in trajectory.given.items()} for r in rows]
    return [Row(prompt_of(trajectory.prompt, parts), framing_of(trajectory), parts) for parts in given]


def prompt_of(text: str, given: Mapping[str, Tensor]) -> Prompt:
    """A source's prompt: its embeddings where those were given, else its text."""
    if "embeddings" not in given:
        return text
    return Conditioning(given["embeddings"], given.get("pooled"))


def framing_of(trajectory: Trajectory) -> Framing | None:
    """How a trajectory's picture came to its size, where that is known."""
    return None if trajectory.fit is None else Fit.from_dict(dict(trajectory.fit)).framing


def denoiser_of(
    backbone: Any, rows: Sequence[Row], guidance: Sequence[float], negative_prompt: Prompt | None, schedule: NoiseSchedule
) -> Denoiser:
    """The denoiser of some rows.

    guidance: a scale per row, 1 or less turning it off, as in diffusers; negative_prompt: None for the family's own. The
    negative of a row sees the same size and the same ControlNet, but no IP-Adapter picture. Raises InputError on bad scales.
    """
    if any(scale < 0 for scale in guidance):
        raise InputError(f"guidance scale {min(guidance):g} is negative; 1 turns guidance off, 7.5 is usual")
    framings = [row.framing for row in rows]
    embedded = backbone.embed([*(row.prompt for row in rows), negative_prompt], [*framings, framings[0]])
    own, negative = embedded.select(range(len(rows))), embedded.select([len(rows)] * len(rows))
    if own.time_ids is not None:
        negative = negative.having({"time_ids": own.time_ids})
    added = _stacked(own, [row.given for row in rows])
    own, negative = own.having(added), negative.having({k: v for k, v in added.items() if not k.startswith(IMAGE)})
    scales = tuple(max(1.0, float(scale)) for scale in guidance)
    if backbone.embeds_guidance:
        told = torch.tensor(scales, device=own.embeddings.device)
        own, negative = (half.having({"guidance": told}) for half in (own, negative))
        scales = (1.0,) * len(rows)
    return Denoiser(backbone, schedule, own, scales, negative)


def _stacked(own: Conditioning, given: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Pictures and hints of all rows; a row without one keeps what it has, or gets a hint of scale 0."""
    here = {name: part for name, part in own.parts().items() if name.startswith(IMAGE)}
    found: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for row in given for name in row if name not in TEXT):
        like = next(row[name] for row in given if name in row).to(own.embeddings.device)
        _require_alike(name, here.get(name), [row[name] for row in given if name in row])
        rows = [row[name].to(like) if name in row else here[name][r : r + 1] if name in here else torch.zeros_like(like)
                for r, row in enumerate(given)]  # fmt: skip
        found[name] = torch.cat(rows)
    return found


def _require_alike(name: str, blank: Tensor | None, given: Sequence[Tensor]) -> None:
    """That what an inversion was shown still goes with what is loaded: `blank`, and what the targets are shown."""
    image = name.startswith(IMAGE)
    if (image and blank is None) or len({part.shape[1:] for part in (*given, *([] if blank is None else [blank]))}) > 1:
        argument, adapters = ("ip_adapter_image", "IP-Adapters") if image else ("control_image", "ControlNets")
        raise InputError(
            f"{argument}: the inversion was made with other {adapters} than are loaded now; load the same ones, or invert the "
            "image again"
        )
