"""What users add to a pipeline beside its text: IP-Adapters, ControlNets, and models distilled with their guidance scale.

Each row of a batch has its own: a row without a picture gets the IP-Adapter's "no picture" and no residual of a ControlNet, so
a source branch is never shown what is meant for the targets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from easyinv_edit import images
from easyinv_edit.conditioning import IMAGE, Conditioning
from easyinv_edit.errors import InputError


def has_ip_adapter(pipe: Any) -> bool:
    """Whether `load_ip_adapter` was called and not undone."""
    return getattr(pipe.unet.config, "encoder_hid_dim_type", None) == "ip_image_proj" and pipe.unet.encoder_hid_proj is not None


def image_parts(pipe: Any, pictures: Any) -> dict[str, Tensor]:
    """One row of IP-Adapter embeddings. pictures: one, or a list with one per loaded adapter."""
    if not has_ip_adapter(pipe):
        raise InputError("ip_adapter_image: the pipeline has no IP-Adapter; call its load_ip_adapter(...) first")
    count = len(pipe.unet.encoder_hid_proj.image_projection_layers)
    given = list(pictures) if isinstance(pictures, list | tuple) else [pictures]
    if len(given) != count:
        raise InputError(f"ip_adapter_image: {len(given)} pictures for {count} IP-Adapters; give a list with one for each")
    return _image_embeddings(pipe, [images.load(picture) for picture in given], 1)


def no_image_parts(pipe: Any) -> dict[str, Tensor]:
    """One row of what the loaded IP-Adapters, if any, are given for no picture."""
    if not has_ip_adapter(pipe):
        return {}
    blank = [Image.new("RGB", (8, 8))] * len(pipe.unet.encoder_hid_proj.image_projection_layers)
    return _image_embeddings(pipe, blank, 0)


def _image_embeddings(pipe: Any, pictures: Sequence[Image.Image], half: int) -> dict[str, Tensor]:
    """half: 0 for the unconditional embeddings, 1 for the picture's."""
    if getattr(pipe, "image_encoder", None) is None:
        raise InputError(
            "the IP-Adapter came without an image encoder; load one with load_ip_adapter(image_encoder_folder=...)"
        )
    pairs = pipe.prepare_ip_adapter_image_embeds(list(pictures), None, pipe._execution_device, 1, True)
    return {f"{IMAGE}{i}": pair.chunk(2)[half] for i, pair in enumerate(pairs)}


def hint_parts(pipe: Any, pictures: Any, scale: Any, size: tuple[int, int]) -> dict[str, Tensor]:
    """One row of ControlNet's pictures and scales. pictures, scale: one, or a list with one per ControlNet; size: (height,
    width) of the model's picture, to which they are stretched as diffusers does."""
    count = len(_nets(pipe))
    given = list(pictures) if isinstance(pictures, list | tuple) else [pictures]
    scales = list(scale) if isinstance(scale, list | tuple) else [scale] * count
    for name, values in (("control_image", given), ("controlnet_conditioning_scale", scales)):
        if len(values) != count:
            raise InputError(f"{name}: {len(values)} given for {count} ControlNets; give a list with one for each")
    fitted = [images.fit(images.load(picture), size, "stretch")[0] for picture in given]
    hints = images.to_unit(torch.cat([images.to_tensor(picture) for picture in fitted]))[None]
    on = pipe._execution_device
    return {"hints": hints.to(on), "hint_scales": torch.tensor([[_strength(s) for s in scales]], device=on)}


def _strength(scale: Any) -> float:
    if not isinstance(scale, Real) or not math.isfinite(scale):
        raise InputError(f"controlnet_conditioning_scale is {scale!r}; give a number, 1 is usual and 0 turns the net off")
    return float(scale)


def _nets(pipe: Any) -> list[Any]:
    net = getattr(pipe, "controlnet", None)
    if net is None:
        raise InputError("control_image: the pipeline has no ControlNet; load one of diffusers' ControlNet pipelines")
    nets = list(net.nets) if hasattr(net, "nets") else [net]
    if unserved := [type(n).__name__ for n in nets if type(n).__name__ != "ControlNetModel"]:
        raise InputError(f"control_image: {unserved[0]} is not served; use a plain ControlNetModel")
    if any(n.config.global_pool_conditions for n in nets):  # diffusers then gives the unconditional half none
        raise InputError("control_image: a ControlNet with global_pool_conditions (shuffle) is not served; use another")
    return nets


def residuals(
    pipe: Any, z: Tensor, label: Tensor, conditioning: Conditioning, added: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Any]:
    """The UNet's arguments with what the ControlNets add; a row with scale 0 is not evaluated and gets exact zeros.

    z (rows, C, H, W) and label as the UNet gets them; added: the rows' `added_cond_kwargs`; dtype: the UNet's.
    """
    if conditioning.hints is None or conditioning.hint_scales is None:
        return {}
    nets = _nets(pipe)
    total: list[Tensor] = []
    if len(nets) != conditioning.hints.shape[1]:
        raise InputError(
            f"control_image: the inversion was made with {conditioning.hints.shape[1]} ControlNets and the pipeline has "
            f"{len(nets)}; load the same ones, or invert the image again"
        )
    _fetch(pipe.controlnet)
    for i, net in enumerate(nets):
        rows = conditioning.hint_scales[:, i].nonzero().flatten().tolist()
        if not rows:
            continue
        own = conditioning.select(rows)
        assert own.hints is not None
        assert own.hint_scales is not None
        own_dtype = net.dtype  # asked once a call: diffusers walks through the whole net for it
        down, mid = net(
            z[rows].to(own_dtype),
            label[rows] if label.ndim else label,
            encoder_hidden_states=own.embeddings.to(own_dtype),
            controlnet_cond=own.hints[:, i].to(own_dtype),
            added_cond_kwargs={key: value[rows] for key, value in added.items() if isinstance(value, Tensor)},
            return_dict=False,
        )
        scale = own.hint_scales[:, i].to(mid).reshape(-1, 1, 1, 1)
        spread = [_spread((scale * part).to(dtype), rows, len(z)) for part in (*down, mid)]
        total = [a + b for a, b in zip(total, spread, strict=True)] if total else spread
    if not total:
        return {}
    return {"down_block_additional_residuals": total[:-1], "mid_block_additional_residual": total[-1]}


def _fetch(net: Any) -> None:
    """Bring an offloaded ControlNet to where it computes. The hook of several lies on all of them together, and each is called
    by itself, for its own rows."""
    if hasattr(net, "_hf_hook"):
        net._hf_hook.pre_forward(net)


def _spread(part: Tensor, rows: Sequence[int], count: int) -> Tensor:
    """Some rows' residual as one of all rows, zero elsewhere."""
    full = part.new_zeros(count, *part.shape[1:])
    full[list(rows)] = part
    return full


def guidance_embedding(pipe: Any, conditioning: Conditioning, dtype: torch.dtype) -> dict[str, Tensor]:
    """The argument by which a distilled UNet of that dtype is told its guidance scale; diffusers counts it from 1."""
    size = pipe.unet.config.time_cond_proj_dim
    if size is None or conditioning.guidance is None:
        return {}
    embedded = pipe.get_guidance_scale_embedding(conditioning.guidance.cpu() - 1, embedding_dim=size)
    return {"timestep_cond": embedded.to(conditioning.embeddings.device, dtype)}
