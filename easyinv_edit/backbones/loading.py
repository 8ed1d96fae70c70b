"""Loading diffusers pipelines from folders and the hub, and saying in one line why it cannot be done."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from easyinv_edit.errors import ModelError, first_line
from easyinv_edit.model_check import examine_model
from easyinv_edit.models import download_command, on_disk, preset

OFFLINE_SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
HTTP_CLIENTS = ("httpx", "httpx2", "requests")
"""Libraries that huggingface_hub has used to reach the hub; their errors have no common type."""


def load_pipeline(model: str | os.PathLike[str], *, dtype: torch.dtype | None = None, **options: Any) -> Any:
    """`DiffusionPipeline.from_pretrained` with safetensors only and no remote code.

    model: a folder or a hub name; dtype: of the weights; options: anything else it takes. Raises ModelError in one line, which
    says what is wrong with a folder, or how to get a model from the hub where it cannot be reached.
    """
    from diffusers import DiffusionPipeline

    options = {"use_safetensors": True, "trust_remote_code": False, **options}
    if dtype is not None:
        options["dtype"] = dtype
    name = os.fspath(model)
    try:
        pipe = DiffusionPipeline.from_pretrained(str(on_disk(name) or name), **options)
    except Exception as error:  # a damaged folder makes diffusers raise nearly every type
        raise ModelError(" ".join(_refusal(name, options, error).splitlines())) from error
    return _with_vocabulary(name, pipe)


def load_lora(pipe: Any, lora: str | os.PathLike[str], scale: float = 1.0) -> None:
    """Load a LoRA into a pipeline at a strength. Raises ModelError in one line, with the remedy where peft is missing.

    lora: a safetensors file, a folder, or a hub name. It stays a layer of its own; nothing is fused.
    """
    from diffusers.utils import is_peft_available

    if not is_peft_available():
        raise ModelError(f"{lora}: a LoRA needs peft; run `pip install 'easyinv-edit[lora]'`")
    if os.fspath(lora).endswith(".safetensors") and not on_disk(lora):
        raise ModelError(f"{lora}: there is no such file; give a LoRA's safetensors file, its folder, or a hub name")
    try:
        pipe.load_lora_weights(os.fspath(on_disk(lora) or lora), adapter_name="recipe", use_safetensors=True)
        pipe.set_adapters("recipe", scale)
    except Exception as error:  # as for models, nearly every type
        raise ModelError(f"{lora}: cannot be loaded as a LoRA of this model ({first_line(error)})") from error


def _with_vocabulary(name: str, pipe: Any) -> Any:
    """The pipeline, unless a tokenizer is empty: where its files are missing transformers makes one that knows no word."""
    for end in ("", "_2"):
        tokenizer, encoder = (getattr(pipe, f"{part}{end}", None) for part in ("tokenizer", "text_encoder"))
        wanted = getattr(getattr(encoder, "config", None), "vocab_size", 0)
        if tokenizer is not None and len(tokenizer) < wanted / 2:
            raise ModelError(
                f"{name}: the tokenizer{end} has {len(tokenizer)} entries and the text encoder {wanted}; its vocabulary "
                "(tokenizer.json, or vocab.json with merges.txt) is missing, so download it again"
            )
    return pipe


def _refusal(name: str, options: Mapping[str, Any], error: Exception) -> str:
    """Why a model could not be loaded, and what to do."""
    unloadable = f"{name}: cannot be loaded as a diffusers model"
    plain = f"{unloadable} ({first_line(error)}); give a folder or hub name with safetensors weights"
    if _is_local(name):
        found = [] if options.get("variant") else _folder_problems(name)
        more = f" ({len(found) - 1} more: `easyinv-edit models check {name}`)" if len(found) > 1 else ""
        return f"{unloadable}: {found[0]}{more}" if found else plain
    known = preset(name)
    if known is not None:
        return f"{name}: is the name of a preset; its model is {known.id}, see `easyinv-edit models show {name}`"
    if _is_refused(error):
        return (
            f"{name}: is no folder, and the hub has no model of that name, or keeps it private or gated; check the name, and "
            "where it needs an account run `hf auth login`"
        )
    if cause := _unreachable(options, error):
        return (
            f"{name}: is no folder and not, or not wholly, in the local hub cache, and {cause}; where there is network run "
            f"`{download_command(name)}`, and give that FOLDER here"
        )
    return plain


def _is_local(name: str) -> bool:
    """Whether a text means a path and no hub name, which is `name` or `owner/name`."""
    return on_disk(name) is not None or name.startswith((".", "~")) or Path(name).is_absolute() or name.count("/") > 1


def _folder_problems(name: str) -> list[str]:
    """What is wrong with a folder, as far as its files tell; nothing where they look right."""
    try:
        return list(examine_model(name).problems)
    except ModelError as error:
        return [str(error).removeprefix(f"{name}: ")]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_refused(error: Exception) -> bool:
    """Whether the hub answered that it does not hand the model out."""
    from huggingface_hub.errors import RepositoryNotFoundError

    return any(isinstance(cause, RepositoryNotFoundError) for cause in _chain(error))


def _unreachable(options: Mapping[str, Any], error: Exception) -> str:
    """How it comes that the hub was not reached; nothing where it was, or was not needed."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    causes = list(_chain(error))
    of_network = [cause for cause in causes if type(cause).__module__.split(".")[0] in HTTP_CLIENTS]
    of_network += [cause for cause in causes if isinstance(cause, ConnectionError | TimeoutError)]
    absent = any(isinstance(cause, LocalEntryNotFoundError) for cause in causes)
    if any(isinstance(cause, HfHubHTTPError) for cause in causes) or not (absent or of_network):
        return ""
    if options.get("local_files_only"):
        return "local_files_only=True keeps the hub from being asked"
    if constants.HF_HUB_OFFLINE:
        switch = next((name for name in OFFLINE_SWITCHES if os.environ.get(name)), OFFLINE_SWITCHES[0])
        return f"the hub is switched off by {switch}"
    return f"the hub cannot be reached ({first_line(of_network[0])})" if of_network else "the hub cannot be reached"
