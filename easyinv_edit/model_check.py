"""Look at a model folder without loading weights: its family, what it was trained for, what is missing, which presets fit.

Reads JSON files and the headers of safetensors files; knows neither torch nor diffusers, so the answer is there at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from easyinv_edit.errors import ModelError
from easyinv_edit.model_configs import Configs, SchedulerConfig, UNetConfig, read_configs
from easyinv_edit.model_strangers import recognise
from easyinv_edit.models import ModelPreset, cached_folder, download_command, on_disk, preset, presets
from easyinv_edit.weight_files import Unreadable, Weights, read_json, weights_of

NEEDED = {
    "sd": ("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
    "sdxl": ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"),
}
"""The parts each family's adapter works with."""
TASKS = {5: "for depth maps", 7: "for upscaling", 8: "that follows instructions", 9: "for inpainting"}
"""What a UNet of so many input channels is made for."""
PREDICTIONS = ("epsilon", "v_prediction")
WITH_BETAS = (
    *("CogVideoX", "DDIM", "DDPMS", "DDPMP", "DEIS", "DPMSolver", "Euler", "Heun", "KDPM2", "LCM", "LMS", "PNDM", "RePaint"),
    *("SASolver", "TCD", "UniPC"),
)
"""How the names of diffusers' schedulers begin that have betas, even where their file names none."""


@dataclass(frozen=True)
class ModelReport:
    """What was found at a path; None stands for what is not told there.

    family: "sd", "sdxl", or None where no adapter serves it; pipeline: diffusers' class; timestep_spacing, zero_terminal_snr:
    the scheduler's; native_size: (height, width) in pixels; self_attention_sites: as `attention_control.list_sites` counts
    them; guidance_embedded: whether the UNet takes its guidance scale as an input; parts: weights by the part's name;
    bytes_on_disk: of all files; presets: names of those that fit, the nearest first; problems: what keeps it from being used,
    each a line that says what to do; notes: what is good to know.
    """

    path: str
    family: str | None = None
    pipeline: str | None = None
    prediction_type: str | None = None
    timestep_spacing: str | None = None
    zero_terminal_snr: bool | None = None
    native_size: tuple[int, int] | None = None
    cross_attention_dim: int | None = None
    self_attention_sites: int | None = None
    guidance_embedded: bool | None = None
    parts: Mapping[str, Weights] = field(default_factory=dict)
    bytes_on_disk: int = 0
    presets: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether nothing keeps it from being used."""
        return not self.problems

    def facts(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        return {"usable": self.usable, **asdict(self)}


def examine(name: str) -> ModelReport:
    """Look at a folder or file, else at what the local hub cache has under a preset's name or a hub name.

    Raises ModelError where there is nothing of that name, or it is no model.
    """
    if on_disk(name):
        return examine_model(name)
    known = preset(name)
    if known and known.id == "embedded":
        return examine_model(Path(__file__).parent / "tabletop" / "weights")
    folder = cached_folder(known.id if known else name)
    if folder is not None:
        found = examine_model(folder)
        return replace(found, notes=(*found.notes, _built_on(known))) if known and known.load else found
    if known is None:
        raise ModelError(f"{name}: is no folder, no name from `easyinv-edit models list`, and not in the local hub cache")
    return ModelReport(name, known.family, presets=(name,), problems=(_absent(known),), notes=(DOWNLOAD_LESS,))


DOWNLOAD_LESS = (
    'to leave out what is not read, add --include "*.json" --include "*.txt" --include "*/*.safetensors" --exclude "*.fp16.*" '
    '--exclude "*non_ema*"'
)


def _built_on(known: ModelPreset) -> str:
    return f"this is the model that {known.name} is built on; `load` in `easyinv-edit models show {known.name}` says how"


def _absent(known: ModelPreset) -> str:
    return (
        f"{known.id} is not on this machine; where there is network run `{download_command(known.id)}`, then give that FOLDER "
        f"here and as the recipe's model, with the settings of `easyinv-edit models show {known.name}`"
    )


def examine_model(path: str | os.PathLike[str]) -> ModelReport:
    """Look at a local model folder. Raises ModelError where there is nothing, or nothing that is like a model."""
    folder = on_disk(path)
    if folder is None:
        raise ModelError(f"{path}: there is no such folder; give a model folder, or a name from `easyinv-edit models list`")
    try:
        return _looked_at(str(path), folder)
    except OSError as error:
        raise ModelError(f"{path}: cannot be looked at ({error.strerror}: {error.filename})") from error


def _looked_at(path: str, folder: Path) -> ModelReport:
    if not (folder / "model_index.json").is_file():
        return ModelReport(path, problems=(recognise(folder),), bytes_on_disk=_bytes(folder))
    report = ModelReport(path, bytes_on_disk=_bytes(folder))
    try:
        index = read_json(folder / "model_index.json")
    except Unreadable as error:
        return replace(report, problems=(f"model_index.json: {error}",))
    return _examined(report, folder, index)


def _bytes(path: Path) -> int:
    """Of a file, or of all files below a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _examined(report: ModelReport, folder: Path, index: Mapping[str, Any]) -> ModelReport:
    classes = {name: str(kind[1]) for name, kind in index.items() if isinstance(kind, list) and len(kind) == 2 and kind[1]}
    classes = {name: kind for name, kind in classes.items() if not name.startswith("_")}
    configs, problems = read_configs(folder)
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str):
        problems.append(f"model_index.json: its pipeline is {pipeline!r}; code that comes with a model is never run")
    family, unserved = _family(classes, configs)
    parts = {name: _part(folder / name, kind) for name, kind in classes.items()}
    problems += [*unserved, *(_schedule(configs.scheduler, classes.get("scheduler", "")) if configs.scheduler else ())]
    problems += [problem for _, found in parts.values() for problem in found]
    report = replace(
        report,
        family=family,
        pipeline=str(pipeline),
        parts={name: weights for name, (weights, _) in parts.items() if weights is not None},
        problems=tuple(problems),
        notes=tuple(_notes(configs)),
        **_facts(configs),
    )
    return replace(report, presets=tuple(_fitting(report)))


def _facts(configs: Configs) -> dict[str, Any]:
    """What the configurations say, by the report's names."""
    facts: dict[str, Any] = {"native_size": configs.native_size}
    if configs.scheduler:
        facts |= {key: getattr(configs.scheduler, key) for key in ("prediction_type", "timestep_spacing")}
        facts["zero_terminal_snr"] = configs.scheduler.rescale_betas_zero_snr
    if configs.unet:
        width = configs.unet.cross_attention_dim
        facts["cross_attention_dim"] = width if isinstance(width, int) else None
        facts["self_attention_sites"] = configs.unet.self_attention_sites
        facts["guidance_embedded"] = configs.unet.time_cond_proj_dim is not None
    return facts


def _family(classes: Mapping[str, str], configs: Configs) -> tuple[str | None, list[str]]:
    """The family whose adapter serves these parts, and why none does, each a line."""
    unet = configs.unet
    if classes.get("unet") != "UNet2DConditionModel":
        name = next((name for name in ("unet", "transformer", "decoder", "prior") if name in classes), None)
        found = f"its {name} is a {classes[name]}" if name else "it has no UNet"
        return None, [f"{found}; only the UNets of Stable Diffusion 1.x, 2.x and XL (UNet2DConditionModel) are served"]
    if unet is None:  # said where parts are looked at
        return None, []
    if unserved := list(_unserved(unet, configs)):
        return None, unserved
    family = "sdxl" if unet.addition_embed_type == "text_time" else "sd"
    if family == "sdxl" and "text_encoder" not in classes and "text_encoder_2" in classes:
        return None, ["it is SDXL's refiner (no first text encoder), which is not served; take the base model"]
    if family == "sd" and "text_encoder_2" in classes:
        return None, ["it has a second text encoder but no SDXL UNet (addition_embed_type text_time), which is not served"]
    lacking = [name for name in NEEDED[family] if name not in classes]
    return family, [f"model_index.json lists no {', no '.join(lacking)}; download the whole model"] if lacking else []


def _unserved(unet: UNetConfig, configs: Configs) -> Iterator[str]:
    """Why a UNet is not served by any family."""
    latent = configs.vae.latent_channels if configs.vae else 4
    if unet.in_channels != latent:
        task = TASKS.get(unet.in_channels, "for another task")
        yield (
            f"its UNet takes {unet.in_channels} channels where the latents have {latent}: a model {task}; "
            "take the text-to-image model it was made from"
        )
    if unet.class_embed_type is not None or unet.num_class_embeds is not None:
        yield "its UNet needs a class or a picture beside the text (class embedding), which is not served"
    if unet.addition_embed_type not in (None, "text_time"):
        yield f"its UNet needs more than text (addition_embed_type {unet.addition_embed_type}), which is not served"


def _schedule(scheduler: SchedulerConfig, kind: str) -> Iterator[str]:
    """What keeps a DDIM schedule from being made of a scheduler's configuration; kind: its class."""
    name = "scheduler/scheduler_config.json"
    if scheduler.beta_start is None and not kind.startswith(WITH_BETAS):
        yield f"scheduler: {kind} has no betas (flow matching or the like); only schedulers of the DDPM kind are served"
    if scheduler.prediction_type not in PREDICTIONS:
        yield f"{name}: prediction_type is {scheduler.prediction_type}; {' and '.join(PREDICTIONS)} are served"
    if scheduler.rescale_betas_zero_snr and scheduler.prediction_type == "epsilon" and scheduler.timestep_spacing != "leading":
        yield (
            f"{name}: zero terminal SNR with epsilon prediction cannot be inverted; load the model in Python with "
            "schedule={'timestep_spacing': 'leading'}"
        )


def _part(folder: Path, kind: str) -> tuple[Weights | None, list[str]]:
    """The weights of a part, if it has any, and what is missing of it, each a line; kind: its class."""
    name = folder.name
    if not folder.is_dir():
        instead = "" if name in NEEDED["sdxl"] else ", or write [null, null] for it"
        return None, [f"{name}: there is no such folder, but model_index.json lists it ({kind}); download it again{instead}"]
    if "Tokenizer" in kind:
        vocabulary = ("tokenizer.json", "vocab.json", "spiece.model")
        found = any((folder / file).is_file() for file in vocabulary)
        return None, [] if found else [f"{name}: has no vocabulary ({', '.join(vocabulary)}); download it again"]
    file = "scheduler_config.json" if kind.endswith("Scheduler") else "config.json"
    if kind.endswith(("Processor", "FeatureExtractor", "ProcessorPil")):
        file = "preprocessor_config.json"
    lacking = [] if (folder / file).is_file() else [f"{name}: has no {file}; download it again"]
    if file != "config.json":
        return None, lacking
    weights, problems = weights_of(folder)
    return weights, lacking + problems


def _notes(configs: Configs) -> Iterator[str]:
    if configs.unet and configs.unet.sample_size is None:
        yield "unet/config.json has no sample_size, so the size it was trained at is unknown; give size to every edit"
    if configs.unet and configs.unet.time_cond_proj_dim is not None:
        yield "the UNet was distilled with its guidance scale as an input; guidance costs no further evaluation"


def _fitting(report: ModelReport) -> list[str]:
    """Names of the presets for models of this kind; those that are the folder alone and spaced alike come first."""
    kind = (report.family, report.native_size, report.prediction_type, report.cross_attention_dim)
    fit = [
        known
        for known in (presets().values() if report.family else ())
        if kind == (known.family, (known.size, known.size), known.unet.prediction_type, known.unet.cross_attention_dim)
    ]

    def distance(known: ModelPreset) -> tuple[bool, bool]:
        spacing = known.schedule.get("timestep_spacing", "leading")
        return bool(known.load), spacing != report.timestep_spacing

    return [known.name for known in sorted(fit, key=distance)]
