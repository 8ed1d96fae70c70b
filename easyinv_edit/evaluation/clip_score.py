"""CLIP score: how well a picture goes with a text.

Hessel, Holtzman, Forbes, Le Bras and Choi, "CLIPScore", arXiv 2104.08718, in the form that PIE-Bench and torchmetrics report:
100 * max(cosine, 0) of CLIP's embeddings of picture and prompt, without the paper's factor of 2.5. The model is read from a
local folder; nothing is downloaded.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from easyinv_edit.errors import EasyInvWarning, InputError, first_line
from easyinv_edit.evaluation.metrics import black_outside, check_pictures
from easyinv_edit.images import to_pil

ADVICE = "download openai/clip-vit-large-patch14 from https://huggingface.co, tokenizer and preprocessor_config.json included"
LETTERS = {192: "Ti", 384: "S", 768: "B", 1024: "L", 1280: "H"}
"""What the field calls vision transformers, by width."""


class CLIPScore:
    """CLIP score with a model from a local folder, float32.

    folder: a CLIP model as transformers saves it, with tokenizer and image processor; device: where to compute. Raises
    InputError where the folder holds something else, naming what to download.
    """

    def __init__(self, folder: str | PathLike[str], *, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self._model = open_model(CLIPModel, Path(folder), "a CLIP model", ADVICE).to(self.device)
        try:
            self._tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            self._processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # whatever is missing or damaged
            raise InputError(f"{folder}: its tokenizer or image processor: {first_line(error)}; {ADVICE}") from error
        known, wanted = len(self._tokenizer), self._model.config.text_config.vocab_size
        if known != wanted:  # without its files, transformers makes an empty tokenizer and says nothing
            raise InputError(f"{folder}: its tokenizer knows {known} tokens and its model {wanted}; {ADVICE}")

    @property
    def name(self) -> str:
        """What tables call it; the net is part of the name."""
        return f"CLIP ({vit_name(self._model.config.vision_config)})"

    @torch.no_grad()
    def __call__(self, pictures: Tensor, prompts: Sequence[str], mask: Tensor | None = None) -> Tensor:
        """Scores (B,) from 0 to 100 of RGB pictures (B, 3, H, W) in [0, 1], each with its prompt; float32 on the CPU.

        mask: (B or 1, 1, H, W): the picture is made black where it is not above 0.5, as PIE-Bench scores the edited region; nan
        where it is empty. A prompt that is too long for the model is cut, with a warning. Raises InputError for other shapes or
        values and where there is not one prompt per picture.
        """
        check_pictures(pictures)
        if isinstance(prompts, str) or len(prompts) != len(pictures):
            given = "one text" if isinstance(prompts, str) else f"{len(prompts)} prompts"
            raise InputError(f"{self.name}: {given} for {len(pictures)} pictures; give a list with one prompt per picture")
        if mask is None:
            return self._scores(pictures, prompts)
        blackened, empty = black_outside(pictures, mask)
        return self._scores(blackened, prompts).masked_fill(empty, math.nan)

    def _scores(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = self._processor(images=to_pil(pictures * 2 - 1), return_tensors="pt")["pixel_values"].to(self.device)
        seen = self._model.get_image_features(pixel_values=pixels).pooler_output
        read = self._model.get_text_features(**self._tokens(prompts)).pooler_output
        return 100 * torch.cosine_similarity(seen, read).clamp(min=0).cpu()

    def _tokens(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Token numbers and where they are, (B, tokens). A cut prompt keeps its end token, which is what CLIP reads."""
        longest = self._model.config.text_config.max_position_embeddings
        for prompt in prompts:
            count = len(self._tokenizer(prompt)["input_ids"])
            if count > longest:
                text = f"{self.name}: a prompt of {count} tokens is cut to {longest}: {prompt!r}"
                warnings.warn(text, EasyInvWarning, stacklevel=5)
        tokens = self._tokenizer(list(prompts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        return {key: tokens[key].to(self.device) for key in ("input_ids", "attention_mask")}


def open_model(kind: Any, folder: Path, what: str, advice: str, **options: Any) -> Any:
    """A transformers model of class `kind` from a local folder, float32, for evaluation.

    Weights that the folder lacks would be random and make a score of nothing, so they are an error: raises InputError in one
    line that ends in `advice`.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: holds no config.json; it should be the folder of {what}: {advice}")
    options |= {"local_files_only": True, "dtype": torch.float32, "output_loading_info": True}
    try:
        model, found = kind.from_pretrained(folder, **options)
    except Exception as error:  # a damaged folder raises nearly every type
        raise InputError(f"{folder}: cannot be read as {what} ({first_line(error)}); {advice}") from error
    if found["missing_keys"]:
        key = min(found["missing_keys"])
        raise InputError(f"{folder}: is not {what} ({key} is missing); {advice}")
    return model.eval().requires_grad_(False)


def vit_name(config: Any) -> str:
    """What the field calls a vision transformer: its width as a letter and its patch size, such as ViT-L/14."""
    return f"ViT-{LETTERS.get(config.hidden_size, config.hidden_size)}/{config.patch_size}"
