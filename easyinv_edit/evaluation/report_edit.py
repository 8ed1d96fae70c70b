"""The page of one edit, from the folder that `EditResult.save` writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from easyinv_edit.errors import InputError
from easyinv_edit.evaluation.report_files import content_of, facts_of, list_of, number_of, picture_of, pretty
from easyinv_edit.evaluation.report_page import CEILING, Item, Page, Row


def edit_page(folder: Path, limit: int, side: int) -> Page:
    """The page of an edit's folder; arguments as for `report.read`."""
    content = content_of(folder / "result.json")
    recipe, files = content.get("recipe"), content.get("images")
    if not isinstance(recipe, dict) or not isinstance(files, dict):
        raise InputError(f"{folder / 'result.json'}: holds no edit (no recipe and images); give an edit's output folder")
    prompts = [str(prompt) for prompt in list_of(recipe.get("prompts"))]
    edited = [name for name in files if name.startswith("edited")]
    flags = zip(edited, list_of(content.get("flagged")), strict=False)
    again = "recipe.yaml" if recipe.get("image") else "recipe.yaml with its image added"
    record = {key: content.get(key) for key in ("model", "versions")}
    return Page(
        title="; ".join(prompts) or folder.resolve().name,
        facts=facts_of(_edit_facts(content, recipe)),
        notes=tuple(f"the safety checker made {name} black" for name, flagged in flags if flagged is True),
        tables=(),
        reasons=(),
        figures=(),
        items=(_edit_item(folder, recipe, files, edited, prompts, side),)[:limit],
        blocks=(
            ("recipe", f"Recipe, to be run again as a file {again}", "result.json", pretty(recipe)),
            ("environment", "Environment", "result.json", pretty(record)),
        ),
        count=1,
        side=side,
        stretched=recipe.get("fit") == "stretch",
    )


def _edit_item(
    folder: Path, recipe: Row, files: Mapping[str, Any], edited: Sequence[str], prompts: Sequence[str], side: int
) -> Item:
    """The source, its reconstruction and the edited pictures, each of these with its prompt."""
    own = [name for name in ("source", "reconstruction") if name in files]
    made = [picture_of(folder, str(files[name]), name, f"the {name} picture", side) for name in [*own, *edited]]
    source_prompt = recipe.get("source_prompt")
    texts = [] if source_prompt is None else [("source prompt", str(source_prompt))]
    texts += [(f"prompt of {name}" if len(edited) > 1 else "prompt", text) for name, text in zip(edited, prompts, strict=False)]
    pictures = tuple(replace(picture, shared=picture.label in own) for picture in made)
    return Item("Source and result", "", tuple(texts), pictures)


def _edit_facts(content: Row, recipe: Row) -> dict[str, Any]:
    def part(key: str, name: str, unit: str = "") -> str | None:
        value = content[key].get(name) if isinstance(content.get(key), dict) else None
        return None if value is None else f"{value}{unit}"

    def named(key: str) -> Any:
        return recipe[key].get("name") if isinstance(recipe.get(key), dict) else recipe.get(key)

    memory = number_of(content.get("peak_memory_bytes"))
    return {
        "model": recipe.get("model") or part("model", "name"),
        "inversion": named("inversion"),
        "control": named("control"),
        "steps": recipe.get("num_inference_steps"),
        "guidance": recipe.get("guidance_scale"),
        "evaluations to invert": part("evaluations", "invert"),
        "evaluations to edit": part("evaluations", "edit"),
        "seconds to invert": part("seconds", "invert"),
        "seconds to edit": part("seconds", "edit"),
        "reconstruction": part("reconstruction", "psnr", " dB"),
        CEILING: part("reconstruction", "vae_psnr", " dB"),
        "peak memory": f"{memory / 1e9:.2f} GB" if memory else None,
    }
