"""What is no whole model but often given for one: LoRA files, single-file checkpoints, ControlNets, parts of a pipeline."""

from __future__ import annotations

from pathlib import Path

from easyinv_edit.errors import ModelError
from easyinv_edit.weight_files import PICKLES, Header, Unreadable, read_header, read_json

LORA = ("lora_", ".lora.", "hada_w", "lokr_w")
ROOT = "model.diffusion_model."
"""What single-file checkpoints put before the names of their denoiser's weights."""
TRANSFORMERS = (f"{ROOT}joint_blocks.", f"{ROOT}double_blocks.", "double_blocks.", "joint_blocks.", "transformer_blocks.")
FIRST = f"{ROOT}input_blocks.0.0.weight"


def recognise(path: Path) -> str:
    """What a file, or a folder without model_index.json, is instead of a model, and what to do with it; one line.

    Raises ModelError where it is nothing of the kind.
    """
    found = _recognise_file(path) if path.is_file() else _recognise_folder(path)
    if found is None:
        what = "is no model" if path.is_file() else "is no model: it has no model_index.json"
        raise ModelError(f"{path}: {what}; give a folder that diffusers' save_pretrained wrote, or `hf download` fetched")
    return found


def _recognise_folder(folder: Path) -> str | None:
    if (folder / "adapter_config.json").is_file():
        return _lora(folder)
    if (folder / "config.json").is_file():
        return _part(folder)
    snapshots = sorted(folder.glob("snapshots/*/model_index.json"))
    if snapshots:
        return f"is an entry of the hub cache; give {snapshots[-1].parent}"
    files = [file for file in sorted(folder.iterdir()) if file.suffix in (".safetensors", *PICKLES)]
    return next((text for file in files if (text := _recognise_file(file)) is not None), None)


def _part(folder: Path) -> str:
    """A folder of one part of a pipeline."""
    try:
        config = read_json(folder / "config.json")
    except Unreadable as error:
        return f"config.json: {error}"
    kind = str(config.get("_class_name") or (config.get("architectures") or ["unknown"])[0])
    if kind.startswith("ControlNet"):
        return (
            f"is a ControlNet ({kind}), not a model; load a model with it (diffusers' StableDiffusionControlNetPipeline, "
            "controlnet=...) and give the pipeline to EditPipeline.from_pipe"
        )
    if (folder.parent / "model_index.json").is_file():
        return f"is one part of a model ({kind}); give {folder.parent}"
    return f"is one part of a model ({kind}), not a whole one; give a folder with model_index.json"


def _recognise_file(path: Path) -> str | None:
    if path.suffix in PICKLES:
        return _checkpoint(path, "StableDiffusionPipeline") + "; a pickle can run code, so only one you trust"
    if path.suffix != ".safetensors":
        return None
    try:
        header = read_header(path)
    except Unreadable as error:
        return f"{path.name}: {error}"
    if any(mark in name for name in header for mark in LORA):
        return _lora(path)
    if any(name.startswith(TRANSFORMERS) for name in header):
        return "is a checkpoint of a transformer (Stable Diffusion 3, Flux or the like), which is not served"
    if any(name.startswith(("control_model.", "controlnet_")) for name in header):
        return (
            "is a ControlNet, not a model; load it in diffusers beside a model and give the pipeline to EditPipeline.from_pipe"
        )
    if any(name.startswith(ROOT) for name in header):
        return _single_file(path, header)
    if "conv_in.weight" in header and "time_embedding.linear_1.weight" in header:
        return (
            "is a UNet alone; load its model in diffusers with unet=..., as in `easyinv-edit models show sdxl-lightning`, and "
            "give the pipeline to EditPipeline.from_pipe"
        )
    return None


def _single_file(path: Path, header: Header) -> str:
    shape = header[FIRST][1] if FIRST in header else ()
    if len(shape) == 4 and shape[1] != 4:
        return f"is a checkpoint whose UNet takes {shape[1]} channels (inpainting or the like), which is not served"
    if any(name.startswith("conditioner.embedders.0.model.") for name in header):
        return "is a checkpoint of SDXL's refiner, which is not served; take the base model"
    large = any(name.startswith("conditioner.embedders.1.") for name in header)
    return _checkpoint(path, "StableDiffusionXLPipeline" if large else "StableDiffusionPipeline")


def _checkpoint(path: Path, pipeline: str) -> str:
    return (
        f"is a single-file checkpoint; make a folder of it once, with diffusers: {pipeline}.from_single_file('{path}')"
        ".save_pretrained('FOLDER') (it asks the hub for the configuration, or takes config='FOLDER' of a model of its kind)"
    )


def _lora(path: Path) -> str:
    return (
        f"is a LoRA, not a model; load its model in diffusers, call pipe.load_lora_weights('{path}') and give the pipeline to "
        "EditPipeline.from_pipe"
    )
