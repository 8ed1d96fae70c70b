"""Train the embedded model from nothing: pictures, autoencoder, gate, UNet, judge, export. One command, resumable."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from pydantic import ConfigDict, PositiveInt, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from easyinv_edit.backbones.loading import load_pipeline
from easyinv_edit.errors import EasyInvError, ModelError, RecipeError, first_line
from easyinv_edit.images import save_png, to_pil
from easyinv_edit.tabletop import autoencoder, denoising, judge, networks
from easyinv_edit.tabletop.captions import caption
from easyinv_edit.tabletop.fitting import Fit
from easyinv_edit.tabletop.precision import autocast
from easyinv_edit.tabletop.render import render
from easyinv_edit.tabletop.scene import Scene, random_table

HELD_OUT = 10_000_000
"""Seeds from here on are never trained on."""
TESTED = 512
"""How many held-out pictures the gate and the judge's figures are measured on."""
SHARD = 1000
"""Scenes a file of rendered pictures holds: what an interrupted run loses at most."""
RECORD = "training.json"
"""What a model's folder calls the record of its training."""
Report = Callable[[str], None]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class TrainingRecipe:
    """scenes: how many pictures to render and train on (seeds 0 .. scenes - 1); gate: least PSNR in dB inside held-out objects
    that the autoencoder must reach before the UNet is trained; judge, autoencoder, decoder (the autoencoder's, on the finished
    latents), unet: how long and how fast, see `Fit`; compile: whether torch.compile runs the UNet while it is trained, which
    needs a C++ compiler on a CPU and some minutes at every start or resumption."""

    scenes: PositiveInt
    gate: float
    judge: Fit
    autoencoder: Fit
    decoder: Fit
    unet: Fit
    compile: bool = False


def read_training_recipe(path: Path) -> TrainingRecipe:
    """Read a training recipe. Raises RecipeError with every problem."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return TypeAdapter(TrainingRecipe).validate_python(content)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError([f"{path}: cannot be read ({first_line(error)})"]) from error
    except ValidationError as error:
        items = error.errors(include_url=False)
        raise RecipeError(
            [f"{path}: {'.'.join(map(str, e['loc']))}: {e['msg']} (got {e['input']!r})" for e in items]
        ) from error


def train(
    recipe: TrainingRecipe, folder: Path, device: torch.device, report: Report = print, start: Path | None = None
) -> Path:
    """Run every stage not yet done in `folder` and return the folder of the finished diffusers model.

    A stage that was interrupted resumes from its last checkpoint. start: a finished model's folder, whose judge and encoder are
    taken as they are and whose decoder, UNet and text encoder are trained on, by the recipe anew; its record stands under
    "start" in the new one. Give its UNet a lower rate than a beginning has: at 1e-3 again, the error in strong noise (t600 in
    the log) rose from .0075 to .0088 and ended at .0078, while in weaker noise it fell.

    Raises ModelError where that folder is no such model, EasyInvError where torch.compile is asked for and does not work, or
    the autoencoder fails its gate.
    """
    if recipe.compile:
        _try_compiler(device)
    begun = None if start is None else _begun(start, device)
    folder.mkdir(parents=True, exist_ok=True)
    pictures, masks = _pictures(recipe, folder, device, report)
    scenes = [random_table(seed) for seed in range(recipe.scenes)]
    parts = begun or _new(recipe, pictures, masks, scenes, folder, device, report)
    record: dict[str, Any] = {"recipe": asdict(recipe), "machine": _machine(device), **parts.record}
    latents = _latents(parts.vae, pictures, folder)
    record["decoder"] = autoencoder.train_decoder(parts.vae, latents, pictures, masks, recipe.decoder, folder)
    record["decoder"] |= _gate(recipe, parts.vae, device, parts.critic)
    report(f"decoder: {record['decoder']}")

    def grid(step: int) -> None:
        processors = parts.unet.attn_processors
        save_png(sample_grid(parts.pipeline()), folder / f"samples-{step:06d}.png")
        parts.unet.set_attn_processor(processors)  # the very same ones: others would have a compiled UNet compiled again

    trained = (parts.unet, parts.text, parts.tokenizer)
    record["unet"] = denoising.train(*trained, latents, scenes, recipe.unet, folder, on_save=grid, compiled=recipe.compile)
    report(f"unet: {record['unet']}")
    return export(parts.pipeline(), parts.critic, record, folder / "model")


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What a model is made of before its decoder and its UNet are trained; record: how it got there."""

    critic: judge.Judge
    vae: AutoencoderKL
    text: CLIPTextModel
    tokenizer: CLIPTokenizer
    unet: UNet2DConditionModel
    record: dict[str, Any]

    def pipeline(self) -> StableDiffusionPipeline:
        return networks.build_pipeline(self.vae, self.text, self.tokenizer, self.unet)


def _try_compiler(device: torch.device) -> None:
    """Before hours of training that would end without one."""
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=device))
    except RuntimeError as error:
        raise EasyInvError(
            f"compile: torch.compile does not work here ({first_line(error)}); "
            "install a C++ compiler, or leave compile out of the recipe"
        ) from error


def _new(
    recipe: TrainingRecipe,
    pictures: Tensor,
    masks: Tensor,
    scenes: list[Scene],
    folder: Path,
    device: torch.device,
    report: Report,
) -> _Parts:
    """From nothing: judge and autoencoder are trained."""
    record: dict[str, Any] = {}
    critic, record["judge"] = judge.train(pictures, scenes, recipe.judge, folder, device)
    report(f"judge: {record['judge']}")
    vae, record["autoencoder"] = _autoencoder(recipe, pictures, masks, folder, device)
    report(f"autoencoder: {record['autoencoder']}")
    torch.manual_seed(recipe.unet.seed)
    tokenizer = networks.build_tokenizer()
    text, unet = networks.build_text_encoder(tokenizer).to(device), networks.build_unet().to(device)
    return _Parts(critic, vae, text, tokenizer, unet, record)


def _begun(start: Path, device: torch.device) -> _Parts:
    """From a finished model. Raises ModelError where the folder is none that training made, or of another size."""
    for file in (judge.FILE, RECORD):
        if not (start / file).is_file():
            raise ModelError(f"{start}: has no {file}, so it is no tabletop model; give a folder that `tabletop train` made")
    pipe = load_pipeline(start, dtype=torch.float32).to(device)
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    if side != networks.PICTURE_SIZE:
        raise ModelError(f"{start}: draws {side} pixels, and training is on {networks.PICTURE_SIZE}; start from nothing")
    networks.use_plain_attention(pipe.vae, pipe.unet)
    try:
        record = {"start": json.loads((start / RECORD).read_text(encoding="utf-8"))}
    except ValueError as error:
        raise ModelError(f"{start / RECORD}: is damaged ({error}); give a folder that `tabletop train` made") from error
    return _Parts(judge.load(start / judge.FILE).to(device), pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.unet, record)


def export(pipe: Any, critic: judge.Judge, record: dict[str, Any], target: Path) -> Path:
    """Write the model folder: diffusers' own files in float16, the judge, and the training record."""
    networks.export(pipe, target)
    judge.save(critic, target / judge.FILE)
    (target / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return target


def held_out(count: int) -> list[Scene]:
    """Scenes no network has seen."""
    return [random_table(HELD_OUT + i) for i in range(count)]


def sample_grid(pipe: Any, count: int = 16, guidance_scale: float = 5.0) -> Any:
    """One picture with `count` samples of held-out captions, four a row."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    prompts = [caption(scene) for scene in held_out(count)]
    pictures = pipe(
        prompts, num_inference_steps=25, guidance_scale=guidance_scale, generator=generator, output_type="pt"
    ).images
    rows = [torch.cat(list(row), -1) for row in pictures.float().cpu().split(4)]
    return to_pil(torch.cat(rows, -2)[None] * 2 - 1)[0]


def _pictures(recipe: TrainingRecipe, folder: Path, device: torch.device, report: Report) -> tuple[Tensor, Tensor]:
    """uint8 pictures (N, 3, size, size) and masks (N, 1, size, size), rendered once, in files of `SHARD` scenes."""
    parts = []
    for first in range(0, recipe.scenes, SHARD):
        path = folder / f"pictures-{first:06d}.safetensors"
        if not path.exists():
            seeds = range(first, min(first + SHARD, recipe.scenes))
            report(f"rendering scenes {seeds.start} to {seeds.stop - 1} of {recipe.scenes}")
            pictures, masks = _render_bytes(seeds, device)
            _save({"pictures": pictures, "masks": masks}, path)
        parts.append(load_file(path))
    return torch.cat([part["pictures"] for part in parts]), torch.cat([part["masks"] for part in parts])


def _render_bytes(seeds: range, device: torch.device) -> tuple[Tensor, Tensor]:
    pictures, masks = render([random_table(seed) for seed in seeds], networks.PICTURE_SIZE, device=str(device))
    return (pictures * 255).round().byte(), (masks * 255).round().byte()


def _latents(vae: AutoencoderKL, pictures: Tensor, folder: Path) -> Tensor:
    """The pictures' latents, encoded once for each encoder: a run that is resumed, or trains only the decoder, finds them."""
    path = folder / f"latents-{networks.weights_digest(vae.encoder, vae.quant_conv)[:12]}-{len(pictures)}.safetensors"
    if not path.exists():
        with autocast(next(vae.parameters()).device):
            latents = autoencoder.encode(vae, pictures).float().contiguous()
        _save({"latents": latents}, path)
    return load_file(path)["latents"]


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """The file appears whole or not at all."""
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    partial.replace(path)


def _autoencoder(
    recipe: TrainingRecipe, pictures: Tensor, masks: Tensor, folder: Path, device: torch.device
) -> tuple[AutoencoderKL, dict[str, Any]]:
    """The trained and whitened autoencoder and its record."""
    torch.manual_seed(recipe.autoencoder.seed)
    vae = networks.build_autoencoder().to(device)
    record = autoencoder.train(vae, pictures, masks, recipe.autoencoder, folder)
    vae.eval()
    record["whitening"] = autoencoder.whiten(vae, pictures[:2048])
    return vae, record


def _gate(recipe: TrainingRecipe, vae: AutoencoderKL, device: torch.device, critic: judge.Judge) -> dict[str, Any]:
    """What the autoencoder keeps of held-out pictures. Raises EasyInvError where that is less than the recipe wants."""
    test, test_masks = _render_bytes(range(HELD_OUT, HELD_OUT + TESTED), device)
    record: dict[str, Any] = {**autoencoder.gate(vae, test, test_masks)}
    if record["object_psnr"] < recipe.gate:
        raise EasyInvError(
            f"the autoencoder reaches {record['object_psnr']:.1f} dB inside objects, below the gate of {recipe.gate}; "
            "train it longer"
        )
    scenes = held_out(TESTED)
    record["judged_pictures"] = judge.accuracy(critic, test.float() / 255, scenes)
    record["judged_round_trip"] = judge.accuracy(critic, autoencoder.round_trip(vae, test), scenes)
    return record


def _machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": device.type, "name": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
