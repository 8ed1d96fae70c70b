"""Every model family against diffusers' own pipeline: the same prompts, the same noise, the same latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, LCMScheduler, PNDMScheduler
from PIL import Image
from torch import Tensor, nn

from attention_control import MasaCtrl, StreamRow, list_sites
from easyinv_edit.backbones import StableDiffusion, StableDiffusionXL, wrap
from easyinv_edit.conditioning import Framing
from easyinv_edit.conditions import Row, denoiser_of
from easyinv_edit.cost import Cost, measured
from easyinv_edit.errors import InputError
from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.result import EditResult
from easyinv_edit.sampling import sample
from tests.attention_control.explicit import EXACT, Seen, at, attention, evaluate_by
from tests.attention_control.reference import evaluate_controlled, make_scene, official_rows
from tests.models import BETAS, FAMILIES, sd, sd_v, sdxl, text_encoder

CLOSE = 1e-4
"""Of latents of order 1, in float32."""
T = 4
SOURCE, TARGET = "a red cube", "a blue ball"
MAKERS: dict[str, Callable[[], Any]] = {
    **FAMILIES,
    "sdxl, zeros off": lambda: sdxl(zeros=False),
    "sd-lcm": lambda: sd(time_cond_proj_dim=8),
    "sdxl-lcm": lambda: sdxl(time_cond_proj_dim=8),
}
EACH_FAMILY = pytest.mark.parametrize("name", FAMILIES)
DISTILLED = pytest.mark.parametrize("name", ["sd-lcm", "sdxl-lcm"])

pytestmark = pytest.mark.filterwarnings("ignore::easyinv_edit.errors.EasyInvWarning")


@cache
def made(name: str) -> Any:
    """A pipeline of that name; tests leave it as it is."""
    pipe = MAKERS[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def scheduled(name: str, kind: type[Any], spacing: str = "leading") -> Any:
    """The pipeline of that name beside a scheduler of its own."""
    settings: dict[str, Any] = {**BETAS, "timestep_spacing": spacing, "steps_offset": 1}
    settings |= {"clip_sample": False} if kind in (DDIMScheduler, DDPMScheduler) else {}
    settings |= {"set_alpha_to_one": False} if kind is DDIMScheduler else {}
    settings["prediction_type"] = made(name).scheduler.config.prediction_type
    pipe = type(made(name))(**{**made(name).components, "scheduler": kind(**settings)}, **_flags(name))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _flags(name: str) -> dict[str, Any]:
    if made(name).config.get("force_zeros_for_empty_prompt") is None:
        return {"requires_safety_checker": False}
    zeros = made(name).config.force_zeros_for_empty_prompt
    return {"force_zeros_for_empty_prompt": zeros, "add_watermarker": False}


def noise(rows: int = 1, size: tuple[int, int] = (8, 8)) -> Tensor:
    return torch.randn(rows, 4, *size, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def ours(
    pipe: Any,
    prompts: Sequence[str],
    steps: int = T,
    *,
    guidance: float = 7.5,
    negative: str | None = None,
    framing: Framing | None = None,
    size: tuple[int, int] = (8, 8),
) -> tuple[Tensor, Cost]:
    """Latents that we sample, and the cost."""
    backbone = wrap(pipe)
    rows = [Row(prompt, framing) for prompt in prompts]
    denoiser = denoiser_of(backbone, rows, [guidance] * len(rows), negative, backbone.schedule(steps))
    with measured(backbone.network) as cost:
        return sample(denoiser, noise(len(rows), size)), cost


def theirs(
    name: str,
    prompts: Sequence[str],
    steps: int = T,
    *,
    spacing: str = "leading",
    guidance: float = 7.5,
    negative: str | None = None,
    size: tuple[int, int] = (8, 8),
    output_type: str = "latent",
    **options: Any,
) -> Tensor:
    """What diffusers samples with DDIM from the same noise."""
    pipe = scheduled(name, DDIMScheduler, spacing)
    given = {"height": 4 * size[0], "width": 4 * size[1], "latents": noise(len(prompts), size), "output_type": output_type}
    negatives = None if negative is None else [negative] * len(prompts)
    images = pipe(
        list(prompts), negative_prompt=negatives, num_inference_steps=steps, guidance_scale=guidance, **given, **options
    ).images
    assert isinstance(images, Tensor)
    return images


def assert_close(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max() <= CLOSE
    assert b.abs().max() < 100, "latents of order 1, so that the bound says something"


# Sampling is that of diffusers' own pipeline


@pytest.mark.parametrize(("spacing", "steps"), [("leading", 3), ("leading", 10), ("trailing", 1), ("trailing", 8)])
@pytest.mark.parametrize(
    ("name", "kind"),
    [("sd", PNDMScheduler), ("sd-v", DDPMScheduler), ("sdxl", EulerDiscreteScheduler), ("sdxl", DDIMScheduler)],
)
def test_sampling_is_that_of_diffusers_with_ddim(name: str, kind: type[Any], spacing: str, steps: int) -> None:
    """Whatever the class of the scheduler our pipeline holds."""
    z, cost = ours(scheduled(name, kind, spacing), [TARGET], steps)
    assert_close(z, theirs(name, [TARGET], steps, spacing=spacing))
    assert (cost.calls, cost.evaluations) == (steps, 2 * steps)


@pytest.mark.parametrize("negative", [None, "", "a green ring"])
@pytest.mark.parametrize("name", [*FAMILIES, "sdxl, zeros off"])
def test_the_negative_prompt_is_theirs(name: str, negative: str | None) -> None:
    z, _ = ours(made(name), [TARGET], negative=negative)
    assert_close(z, theirs(name, [TARGET], negative=negative))


def test_no_negative_prompt_is_the_empty_one_except_where_it_is_zeros() -> None:
    alike = {n: torch.equal(*(ours(made(n), [TARGET], 2, negative=p)[0] for p in (None, ""))) for n in MAKERS if "lcm" not in n}
    assert alike == {"sd": True, "sd-v": True, "sdxl": False, "sdxl, zeros off": True}


@EACH_FAMILY
def test_an_empty_prompt_is_text_too(name: str) -> None:
    z, _ = ours(made(name), [""])
    assert_close(z, theirs(name, [""]))


@EACH_FAMILY
def test_several_prompts_of_an_oblong_picture(name: str) -> None:
    size = (8, 16)
    z, _ = ours(made(name), [SOURCE, TARGET], framing=Framing((32, 64), (0, 0), (32, 64)), size=size)
    assert_close(z, theirs(name, [SOURCE, TARGET], size=size))
    assert (z[0] - z[1]).abs().max() > 100 * CLOSE


@pytest.mark.parametrize(
    ("original", "crop", "target"),
    [((96, 64), (8, 0), (32, 32)), ((1024, 1024), (0, 0), (1024, 1024)), ((333, 500), (0, 121), (512, 256))],
)
@pytest.mark.parametrize("negative", [None, "a green ring"])
def test_sdxl_is_told_the_sizes(
    original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int], negative: str | None
) -> None:
    z, _ = ours(made("sdxl"), [TARGET], framing=Framing(original, crop, target), negative=negative)
    told = {"original_size": original, "crops_coords_top_left": crop, "target_size": target}
    assert_close(z, theirs("sdxl", [TARGET], negative=negative, **told))
    assert (z - theirs("sdxl", [TARGET], negative=negative)).abs().max() > 10 * CLOSE, "the sizes matter"


@EACH_FAMILY
@torch.no_grad()
def test_the_decoded_picture_is_theirs(name: str) -> None:
    pixels = wrap(made(name)).decode(ours(made(name), [TARGET])[0])
    assert_close((pixels / 2 + 0.5).clamp(0, 1), theirs(name, [TARGET], output_type="pt"))


@EACH_FAMILY
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_guidance_of_one_or_less_is_none_as_in_diffusers(name: str, scale: float) -> None:
    """Turbo models are used at 0."""
    z, cost = ours(made(name), [TARGET], guidance=scale)
    assert_close(z, theirs(name, [TARGET], guidance=scale))
    assert torch.equal(z, ours(made(name), [TARGET], guidance=1.0)[0])
    assert cost.evaluations == T


def test_a_negative_scale_is_refused() -> None:
    with pytest.raises(InputError, match=r"guidance scale -1 is negative; 1 turns guidance off"):
        ours(made("sd"), [TARGET], guidance=-1)


# Loading


@EACH_FAMILY
def test_a_saved_folder_is_of_its_family_and_samples_the_same(name: str, tmp_path: Path) -> None:
    made(name).save_pretrained(tmp_path)
    loaded = EditPipeline.from_pretrained(tmp_path, local_files_only=True).backbone
    assert type(loaded) is (StableDiffusionXL if name == "sdxl" else StableDiffusion)
    assert loaded.family == name.removesuffix("-v")
    assert loaded.schedule(7) == wrap(made(name)).schedule(7)
    assert loaded.schedule(7).prediction_type == ("v_prediction" if name == "sd-v" else "epsilon")
    loaded.pipe.set_progress_bar_config(disable=True)
    assert_close(ours(loaded.pipe, [TARGET], 2)[0], ours(made(name), [TARGET], 2)[0])


def test_zeros_for_the_missing_negative_prompt_are_the_folders_own(tmp_path: Path) -> None:
    made("sdxl, zeros off").save_pretrained(tmp_path)
    loaded = EditPipeline.from_pretrained(tmp_path, local_files_only=True).backbone
    embedded = loaded.embed([None, ""])
    assert torch.equal(embedded.embeddings[0], embedded.embeddings[1])
    assert embedded.embeddings[0].abs().max() > 0


def test_the_schedule_of_a_folder_can_be_decided(tmp_path: Path) -> None:
    made("sd").save_pretrained(tmp_path)
    own = EditPipeline.from_pretrained(tmp_path).backbone.schedule(4)
    decided = EditPipeline.from_pretrained(tmp_path, schedule={"timestep_spacing": "trailing"}).backbone.schedule(4)
    assert own.timesteps == (-1, 1, 251, 501, 751)
    assert decided.timesteps == (-1, 249, 499, 749, 999)


# Stable Diffusion 2.x


def test_heads_grow_with_the_width_and_projections_are_linear() -> None:
    heads = {name: [site.module.heads for site in list_sites(made(name).unet)] for name in FAMILIES}
    assert heads["sd"] == [2] * 16
    assert heads["sd-v"] == [1] * 4 + [2] * 6 + [1] * 6
    assert heads["sdxl"] == [2] * 70
    for name in FAMILIES:
        linear = [type(m) for path, m in made(name).unet.named_modules() if path.endswith(("proj_in", "proj_out"))]
        assert set(linear) == {nn.Conv2d if name == "sd" else nn.Linear}


@torch.no_grad()
def test_masactrl_is_the_paper_on_heads_of_several_numbers() -> None:
    unet, scene, rows = deepcopy(made("sd-v").unet).double(), make_scene(targets=2), official_rows(2)

    def rule(seen: Seen, row: StreamRow) -> Tensor:
        return attention(seen.query[row], seen.key[seen.mate(row)], seen.value[seen.mate(row)])

    expected = evaluate_by(unet, scene, rows, at(range(10, 16), rule))
    found = evaluate_controlled(unet, MasaCtrl(), scene, rows)
    assert all((found[row] - expected[row]).abs().max() < EXACT for row in rows.rows)
    plain = evaluate_by(unet, scene, rows, at((), rule))
    assert (found[rows.rows[-1]] - plain[rows.rows[-1]]).abs().max() > 1e-6


@torch.no_grad()
def test_a_text_encoder_of_one_layer_less_is_the_penultimate_layer() -> None:
    """That is how Stable Diffusion 2.x says that it reads it."""
    pipe = sd_v()
    whole = pipe.text_encoder
    tokens = pipe.tokenizer([SOURCE, ""], padding="max_length", return_tensors="pt").input_ids
    penultimate = whole(tokens, output_hidden_states=True).hidden_states[-2]
    norm = next(module for path, module in whole.named_modules() if path.endswith("final_layer_norm"))
    pipe.text_encoder = text_encoder(pipe.tokenizer, layers=1)
    missing, _ = pipe.text_encoder.load_state_dict(whole.state_dict(), strict=False)
    assert not missing
    embedded = wrap(pipe).embed([SOURCE, ""]).embeddings
    assert torch.equal(embedded, pipe.encode_prompt([SOURCE, ""], "cpu", 1, False)[0])
    assert torch.allclose(embedded, norm(penultimate), atol=1e-6)
    assert not torch.allclose(embedded, whole(tokens).last_hidden_state, atol=1e-2)


# Whole edits


def edited(name: str, **options: Any) -> EditResult:
    """The same picture inverted and edited, as latents."""
    pipe = EditPipeline.from_pipe(made(name))
    pipe.set_progress_bar_config(disable=True)
    picture = Image.new("RGB", (48, 40), (235, 235, 225))
    picture.paste((200, 40, 40), (12, 10, 34, 30))
    settings = {"control": MasaCtrl(start_step=0), "inversion": "ddim", "output_type": "latent", **options}
    return pipe(picture, TARGET, SOURCE, num_inference_steps=T, **settings)


@EACH_FAMILY
def test_a_second_edit_is_the_first_and_nothing_is_left_behind(name: str) -> None:
    unet = made(name).unet
    own = dict(unet.attn_processors)
    first, second = (edited(name, inversion="easyinv") for _ in range(2))
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.trajectory.latents, second.trajectory.latents)
    assert first.images.isfinite().all()
    after = unet.attn_processors
    assert after.keys() == own.keys()
    assert all(after[path] is own[path] for path in own)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())


@EACH_FAMILY
def test_an_edit_without_guidance_or_control_costs_half(name: str) -> None:
    """Guided targets read the source's row in each half of theirs: four rows a step."""
    guided, off, zero = (edited(name, guidance_scale=scale) for scale in (7.5, 1.0, 0.0))
    free = edited(name, control="none")
    assert torch.equal(off.images, zero.images)
    for other in (off, free):
        assert (other.images - guided.images).abs().max() > 1e-3
    costs = [result.cost["edit"].evaluations for result in (guided, off, zero, free)]
    assert costs == [4 * T, 2 * T, 2 * T, 2 * T]


# Models distilled with their guidance scale as an input (LCM)


@DISTILLED
@pytest.mark.parametrize("scale", [1.0, 1.5, 8.0])
def test_a_distilled_model_is_told_its_scale(name: str, scale: float) -> None:
    z, cost = ours(made(name), [TARGET], guidance=scale)
    assert_close(z, theirs(name, [TARGET], guidance=scale))
    assert cost.evaluations == T, "no row has a twin"


@DISTILLED
@torch.no_grad()
def test_each_row_is_told_its_own(name: str) -> None:
    pipe, scales = made(name), (1.0, 4.0, 9.5)
    backbone = wrap(pipe)
    assert backbone.embeds_guidance
    denoiser = denoiser_of(backbone, [Row(TARGET)] * 3, scales, None, backbone.schedule(T))
    assert denoiser.guidance == (1.0, 1.0, 1.0)
    assert [row.half for row in denoiser.batch] == ["conditional"] * 3
    z, text = noise().expand(3, -1, -1, -1), denoiser.conditioning
    embedded = pipe.get_guidance_scale_embedding(torch.tensor(scales) - 1, embedding_dim=8)
    added = {"text_embeds": text.pooled, "time_ids": text.time_ids}
    expected = pipe.unet(z, 500, text.embeddings, timestep_cond=embedded, added_cond_kwargs=added).sample
    out = backbone.predict(z, 500, text)
    assert torch.equal(out, expected)
    assert min((out[i] - out[j]).abs().max() for i, j in [(0, 1), (1, 2)]) > 1e-5


@DISTILLED
def test_an_edit_of_a_distilled_model_costs_what_one_without_guidance_does(name: str) -> None:
    some, more = (edited(name, guidance_scale=scale) for scale in (2.0, 8.0))
    assert some.cost["edit"].evaluations == more.cost["edit"].evaluations == 2 * T
    assert (some.images - more.images).abs().max() > 1e-4
    assert edited(name.removesuffix("-lcm"), guidance_scale=8.0).cost["edit"].evaluations == 4 * T


def test_an_inversion_remembers_the_scale_it_was_told() -> None:
    pipe = EditPipeline.from_pipe(made("sd-lcm"))
    pipe.set_progress_bar_config(disable=True)
    inverted = pipe.invert(Image.new("RGB", (32, 32), "red"), SOURCE, "ddim", num_inference_steps=2, guidance_scale=4.0)
    assert torch.equal(pipe.reconstruct(inverted)[0], pipe.reconstruct(inverted, guidance_scale=4.0)[0])


@DISTILLED
def test_a_distilled_model_goes_down_the_timesteps_of_its_scheduler(name: str) -> None:
    backbone = wrap(scheduled(name, LCMScheduler))
    assert backbone.schedule(4).timesteps == (-1, 259, 499, 759, 999)


@pytest.mark.parametrize(("name", "kind"), list(product(FAMILIES, [DDIMScheduler, EulerDiscreteScheduler])))
def test_a_model_that_was_not_distilled_is_told_nothing(name: str, kind: type[Any]) -> None:
    backbone = wrap(scheduled(name, kind))
    assert not backbone.embeds_guidance
    denoiser = denoiser_of(backbone, [Row(TARGET)], (4.0,), None, backbone.schedule(T))
    assert denoiser.conditioning.guidance is None
    assert denoiser.guidance == (4.0,)
