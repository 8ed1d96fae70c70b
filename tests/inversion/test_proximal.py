"""Proximal guidance: weak guidance is dropped, and what it leaves alone is held to the inversion."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from easyinv_edit.choices import build
from easyinv_edit.denoiser import Denoiser
from easyinv_edit.errors import InputError
from easyinv_edit.inversion import INVERSIONS, Proximal, sampler_of
from easyinv_edit.sampling import sample
from easyinv_edit.trajectory import Trajectory
from tests.helpers import Output, denoiser_like, gaussian, make_schedule, relative_error, seeded, smooth_latent, toy_denoiser

T = 10
SCHEDULE = make_schedule(T)
QUIET = pytest.mark.filterwarnings("ignore::easyinv_edit.errors.EasyInvWarning")
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])


field = denoiser_like(SCHEDULE, 0.3)
"""A nonlinear denoiser whose guidance direction differs from entry to entry."""


def inverted(method: Proximal, dtype: torch.dtype = torch.float64) -> Trajectory:
    return method.invert(toy_denoiser(field, SCHEDULE), smooth_latent().to(dtype), generator=seeded(0))


def editing(guidance: tuple[float, ...] = (1.0, 7.5, 3.0), output: Output = field) -> Denoiser:
    """The source and its targets, conditioned on 1, 2, 3; all move away from 0."""
    return toy_denoiser(output, SCHEDULE, len(guidance), guidance)


def edited(trajectory: Trajectory, denoiser: Denoiser | None = None, pinned: bool = True) -> Tensor:
    denoiser = editing() if denoiser is None else denoiser
    sampler = sampler_of(trajectory)
    z = trajectory.latents[sampler.start or T].repeat(len(denoiser.guidance), 1, 1, 1)
    return sample(denoiser, z, sampler=sampler, pin=trajectory if pinned else None)


# What becomes of a direction


def thresholded(method: Proximal, direction: Tensor, row: int = 1) -> Tensor:
    """The direction (C, H, W) that an edit follows in a row."""
    method = replace(method, base="ddim")
    directions = sampler_of(inverted(method)).condition(editing(), T).directions
    assert directions is not None
    change = directions[row]
    assert change is not None
    return change(direction)


def direction(seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(4, 8, 8, generator=seeded(seed)[0], dtype=torch.float64)


def limit_of(d: np.ndarray[Any, Any], quantile: float) -> float:
    """The quantile of |d| with linear interpolation, from the sorted values."""
    values = np.sort(np.abs(d).ravel())
    place = quantile * (values.size - 1)
    below = int(np.floor(place))
    above = min(below + 1, values.size - 1)
    return float(values[below] + (place - below) * (values[above] - values[below]))


def shrunk(d: Tensor, quantile: float, norm: str) -> Tensor:
    """Hard and soft threshold, entry by entry."""
    limit = limit_of(d.numpy(), quantile)
    soft = {True: lambda x: x - limit, False: lambda x: x + limit}
    kept = [0.0 if abs(x) <= limit else x if norm == "l0" else soft[x > 0](x) for x in d.flatten().tolist()]
    return torch.tensor(kept, dtype=d.dtype).reshape(d.shape)


@pytest.mark.parametrize("norm", ["l0", "l1"])
@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.7, 0.75, 0.99])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_a_direction_is_thresholded(norm: Any, quantile: float, scale: float) -> None:
    d = direction(scale=scale)
    ours = thresholded(Proximal(norm=norm, quantile=quantile), d)
    assert relative_error(ours, shrunk(d, quantile, norm)) < 1e-5
    assert (ours == 0).sum().item() == round(quantile * (d.numel() - 1) + 0.5), "the share that is dropped"
    assert relative_error(ours, shrunk(d, quantile, "l1" if norm == "l0" else "l0")) > 1e-3, "the norms differ"


def test_the_hard_threshold_leaves_what_it_keeps_bit_for_bit() -> None:
    d = direction()
    ours = thresholded(Proximal(norm="l0"), d)
    assert torch.equal(ours[ours != 0], d[ours != 0])


@pytest.mark.parametrize("norm", ["l0", "l1"])
def test_quantile_zero_leaves_a_direction_alone(norm: Any) -> None:
    assert torch.equal(thresholded(Proximal(norm=norm, quantile=0.0), direction()), direction())


@pytest.mark.parametrize("norm", ["l0", "l1"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_quantile_one_drops_everything(norm: Any, dtype: torch.dtype) -> None:
    for seed in range(8):
        assert not thresholded(Proximal(norm=norm, quantile=1.0), direction(seed).to(dtype)).any()


@pytest.mark.parametrize("norm", ["l0", "l1"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_directions_stay_half(norm: Any, dtype: torch.dtype) -> None:
    d = direction()
    ours = thresholded(Proximal(norm=norm), d.to(dtype))
    assert ours.dtype == dtype
    assert relative_error(ours.double(), shrunk(d.to(dtype).double(), 0.7, norm)) < 0.02


def test_the_source_has_no_threshold() -> None:
    directions = sampler_of(inverted(Proximal())).condition(editing(), T).directions
    assert directions is not None
    assert [change is None for change in directions] == [True, False, False]


# A whole edit


def spread(mask: Tensor, radius: int) -> Tensor:
    """Entries within `radius` of one in `mask` (C, H, W), diagonals included, channel by channel."""
    out = torch.zeros_like(mask)
    for c, y, x in mask.nonzero().tolist():
        out[c, max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1] = True
    return out


def by_hand(method: Proximal, trajectory: Trajectory, guidance: tuple[float, ...]) -> list[Tensor]:
    """The pinned edit's targets over DDIM, one by one."""
    targets = []
    for row, scale in enumerate(guidance[1:], start=1):
        z = trajectory.noise
        for level in range(T, 0, -1):
            label = SCHEDULE.timesteps[level]
            low, high = (field(z, label, torch.full((1, 1, 1), e, dtype=z.dtype)) for e in (0.0, row + 1.0))
            d = high - low
            limit = limit_of(d.numpy(), method.quantile)
            output = low + scale * shrunk(d, method.quantile, method.norm)
            z = SCHEDULE.keep[level] * z + SCHEDULE.push[level] * output
            if level <= method.until * T:
                free = ~spread((d[0].abs() > limit), method.dilation)[None]
                pivot = trajectory.latents[level - 1]
                z = torch.where(free, z + method.inversion_guidance * (pivot - z), z)
        targets.append(z)
    return targets


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"norm": "l1"},
        {"quantile": 0.95, "dilation": 0},
        {"quantile": 0.95, "dilation": 2},
        {"until": 1.0},
        {"until": 0.1, "quantile": 0.9},
        {"until": 0.0},
        {"inversion_guidance": 0.5, "quantile": 0.9},
        {"inversion_guidance": 0.0},
    ],
)
def test_an_edit_is_the_procedure_written_out(settings: dict[str, Any]) -> None:
    method = Proximal(base="ddim", **settings)
    trajectory, guidance = inverted(method), (1.0, 7.5, 3.0)
    ours = edited(trajectory, editing(guidance))
    for target, expected in zip(ours[1:], by_hand(method, trajectory, guidance), strict=True):
        assert relative_error(target, expected[0]) < 1e-6
    plain = edited(inverted(Proximal(base="ddim", quantile=0.0)))
    assert relative_error(ours[1:], plain[1:]) > 1e-3, "it changes the edit"


def test_a_share_of_inversion_guidance_is_exact_in_double_precision() -> None:
    method = Proximal(base="ddim", inversion_guidance=0.3, quantile=0.9)
    trajectory, guidance = inverted(method), (1.0, 7.5)
    expected = by_hand(method, trajectory, guidance)[0]
    assert relative_error(edited(trajectory, editing(guidance))[1:], expected) < 1e-12


def test_each_target_row_has_a_quantile_of_its_own() -> None:
    """Alone or beside a target whose directions are far larger: the same edit."""
    trajectory = inverted(Proximal())
    beside = toy_denoiser(lambda z, t, e: field(z, t, e * torch.where(e == 3, 20.0, 1.0)), SCHEDULE, 3, (1.0, 7.5, 15.0))
    both = edited(trajectory, beside)
    assert relative_error(both[:2], edited(trajectory, beside.select([0, 1]))) < 1e-12
    assert relative_error(both[2:], edited(trajectory, beside.select([0, 2]))[1:]) < 1e-12


@QUIET
@pytest.mark.parametrize("base", [name for name in INVERSIONS if name != "proximal"])
@pytest.mark.parametrize("pinned", [True, False])
def test_the_source_row_is_untouched(base: str, pinned: bool) -> None:
    """Also where it is guided itself."""
    ours, theirs = inverted(Proximal(base=base)), inverted(Proximal(base=base, quantile=0.0, inversion_guidance=0.0))
    assert torch.equal(ours.latents, theirs.latents)
    denoiser = editing((5.0, 7.5, 3.0))
    assert torch.equal(edited(ours, denoiser, pinned)[0], edited(theirs, denoiser, pinned)[0])


@QUIET
@pytest.mark.parametrize("norm", ["l0", "l1"])
@pytest.mark.parametrize("base", [name for name in INVERSIONS if name != "proximal"])
@pytest.mark.parametrize("pinned", [True, False])
def test_quantile_zero_without_inversion_guidance_is_the_base_bit_for_bit(base: str, norm: Any, pinned: bool) -> None:
    ours = inverted(Proximal(base=base, norm=norm, quantile=0.0, inversion_guidance=0.0))
    theirs = INVERSIONS[base]().invert(toy_denoiser(field, SCHEDULE), smooth_latent(), generator=seeded(0))
    expected = edited(theirs, pinned=pinned)
    assert torch.equal(edited(ours, pinned=pinned), expected)
    assert not torch.equal(edited(inverted(Proximal(base=base, norm=norm)), pinned=pinned), expected), "so it can fail"


@pytest.mark.parametrize("base", ["ddim", "negative_prompt"])
def test_targets_that_are_not_guided_are_the_bases_bit_for_bit(base: str) -> None:
    ours, theirs = (inverted(Proximal(base=base, quantile=q, inversion_guidance=q)) for q in (0.7, 0.0))
    denoiser = editing((1.0, 1.0, 1.0))
    assert torch.equal(edited(ours, denoiser), edited(theirs, denoiser))


def levels_of(trajectory: Trajectory, denoiser: Denoiser) -> dict[int, Tensor]:
    """level -> latents of all rows, as the loop goes on with them."""
    seen: dict[int, Tensor] = {}

    def keep(level: int, z: Tensor) -> Tensor:
        seen[level] = z.clone()
        return z

    z = trajectory.noise.repeat(len(denoiser.guidance), 1, 1, 1)
    sample(denoiser, z, sampler=sampler_of(trajectory), pin=trajectory, after_step=keep)
    return seen


@DTYPES
def test_with_everything_dropped_targets_lie_on_the_inversion_at_low_noise(dtype: torch.dtype) -> None:
    """Up to the rounding of z - (z - pivot)."""
    trajectory = inverted(Proximal(quantile=1.0, until=0.4), dtype)
    eps = torch.finfo(dtype).eps
    for level, z in levels_of(trajectory, editing()).items():
        away = (z[1:] - trajectory.latents[level]).abs().max().item()
        assert away < 20 * eps if level < 4 else away > 1e-3, level


def test_entries_that_guidance_kept_are_free_and_all_others_lie_on_the_inversion() -> None:
    """Guidance acts at one entry; with an output that looks at each entry alone, the edit stays within its dilation."""
    place = (1, 3, 6)

    def pointed(z: Tensor, t: int, e: Tensor) -> Tensor:
        moved = gaussian(SCHEDULE)(z, t, e) + 0.3 * e.mean((1, 2))[:, None, None, None] * at(place)
        return moved + 0.05 * (e.mean((1, 2)) > 1.5)[:, None, None, None]  # targets drift everywhere, by a little

    for dilation in (0, 1, 3):
        method = Proximal(quantile=0.9999, until=1.0, dilation=dilation, base="ddim")
        trajectory = method.invert(toy_denoiser(pointed, SCHEDULE), smooth_latent())
        away = (edited(trajectory, editing((1.0, 7.5), pointed))[1] - trajectory.clean[0]).abs()
        assert torch.equal(away > 1e-12, spread(at(place) > 0, dilation)), dilation


def at(place: tuple[int, int, int]) -> Tensor:
    mask = torch.zeros(4, 8, 8, dtype=torch.float64)
    mask[place] = 1.0
    return mask


@pytest.mark.parametrize(("until", "drawn"), [(0.0, 0), (0.1, 1), (0.4, 4), (0.45, 4), (1.0, 10)])
def test_until_is_the_share_of_levels_that_are_drawn(until: float, drawn: int) -> None:
    on, off = (levels_of(inverted(Proximal(base="ddim", until=u, quantile=0.9)), editing((1.0, 7.5))) for u in (until, 0.0))
    changed = [level for level in on if not torch.equal(on[level], off[level])]
    assert changed == list(range(drawn - 1, -1, -1))


@DTYPES
@pytest.mark.parametrize("norm", ["l0", "l1"])
def test_latents_keep_their_dtype(norm: Any, dtype: torch.dtype) -> None:
    trajectory = inverted(Proximal(norm=norm), dtype)
    out = edited(trajectory)
    assert trajectory.latents.dtype == out.dtype == dtype
    assert out.isfinite().all()


# What it can be based on


@QUIET
@pytest.mark.parametrize("base", [name for name in INVERSIONS if name != "proximal"])
def test_it_inverts_and_costs_like_its_base(base: str) -> None:
    plain, ours = INVERSIONS[base](), Proximal(base=base)
    trajectory = ours.invert(toy_denoiser(field, SCHEDULE), smooth_latent(), generator=seeded(0))
    expected = plain.invert(toy_denoiser(field, SCHEDULE), smooth_latent(), generator=seeded(0))
    assert torch.equal(trajectory.latents, expected.latents)
    assert trajectory.extras.keys() == expected.extras.keys()
    assert ours.passes == plain.passes
    assert [ours.evaluations(T, g) for g in (False, True)] == [plain.evaluations(T, g) for g in (False, True)]
    assert sampler_of(trajectory).start == sampler_of(expected).start


def test_it_refuses_itself_as_base() -> None:
    with pytest.raises(InputError, match="proximal: base: proximal guidance cannot refine itself") as caught:
        build(INVERSIONS, {"name": "proximal", "base": "proximal"}, "inversion method")
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ValueError, match="cannot refine itself"):
        Proximal(base=Proximal())


@pytest.mark.parametrize(
    "settings",
    [
        {"quantile": -0.1},
        {"quantile": 1.1},
        {"norm": "l2"},
        {"inversion_guidance": 2.0},
        {"until": 4},
        {"dilation": -1},
        {"dilation": 1.5},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        Proximal(**settings)
