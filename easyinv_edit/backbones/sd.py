"""Stable Diffusion 1.x and 2.x (epsilon and v prediction) behind the Backbone protocol.

A thin adapter over the parts of a diffusers pipeline: nothing is cast, copied or replaced, so the user's LoRA, offload and
scheduler stay theirs. Latents are float32 whatever the UNet's dtype (float64 for a float64 UNet).
"""

from __future__ import annotations

import math
import re
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from easyinv_edit.conditioning import Conditioning
from easyinv_edit.errors import EasyInvWarning, ModelError
from easyinv_edit.schedule import NoiseSchedule


class StableDiffusion:
    """Adapter over a loaded pipeline with `vae`, `text_encoder`, `tokenizer`, `unet` and `scheduler`."""

    family = "sd"

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    @staticmethod
    def serves(pipe: Any) -> bool:
        """Whether `pipe` looks like SD 1.x / 2.x text-to-image: one text encoder, four latent channels in the UNet."""
        parts = [getattr(pipe, name, None) for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")]
        if any(part is None for part in parts) or getattr(pipe, "text_encoder_2", None) is not None:
            return False
        return bool(pipe.unet.config.in_channels == pipe.vae.config.latent_channels)

    @property
    def network(self) -> nn.Module:
        """The UNet."""
        return self.pipe.unet

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes, right under offload too."""
        return self.pipe._execution_device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of latents: at least float32."""
        return torch.promote_types(torch.float32, self.pipe.unet.dtype)

    @property
    def downscale(self) -> int:
        """Pixels per latent cell and side."""
        return self.pipe.vae_scale_factor

    @property
    def native_size(self) -> tuple[int, int]:
        """(height, width) in pixels the UNet was trained for."""
        sample = self.pipe.unet.config.sample_size
        height, width = sample if isinstance(sample, (list, tuple)) else (sample, sample)
        return height * self.downscale, width * self.downscale

    @property
    def size_multiple(self) -> int:
        """Picture sides must be multiples of this: the VAE's factor times the UNet's own down-scaling."""
        return self.downscale * 2 ** (len(self.pipe.unet.config.block_out_channels) - 1)

    def identity(self) -> dict[str, Any]:
        """What tells this model from another, stored in inversion files: its name and a few UNet weights.

        Compare with `same_model`: a model keeps its identity under any dtype, with LoRA loaded, and wherever its folder lies.
        """
        unet = self.pipe.unet
        weights = (unet.conv_in.weight, unet.time_embedding.linear_1.weight, unet.conv_out.weight)
        probe = [value for w in weights for value in w.detach().float().flatten()[:: max(1, w.numel() // 8)][:8].tolist()]
        return {"family": self.family, "name": str(self.pipe.config.get("_name_or_path") or ""), "probe": probe}

    def predict(self, z: Tensor, timestep: int | Tensor, conditioning: Conditioning) -> Tensor:
        """Raw UNet output (rows, C, H, W) in the latents' dtype; timestep: one for all rows, or (rows,)."""
        unet = self.pipe.unet
        text = conditioning.embeddings.to(unet.dtype)
        label = torch.as_tensor(timestep, device=z.device)
        return unet(z.to(unet.dtype), label, encoder_hidden_states=text, return_dict=False)[0].to(z.dtype)

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (rows, 3, H, W) in [-1, 1] -> latents of the posterior's mode, scaled. Float32 VAE where it is half."""
        with _float32_vae(self.pipe.vae) as vae:
            posterior = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist
        return (posterior.mode() * vae.config.scaling_factor).to(self.dtype)

    def decode(self, z: Tensor) -> Tensor:
        """Latents -> pixels (rows, 3, H, W) in about [-1, 1], float32."""
        with _float32_vae(self.pipe.vae) as vae:
            pixels = vae.decode(z.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        return pixels.float()

    def embed(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts as the pipeline itself would; warns once, naming the words that do not fit."""
        texts = [self._fitting(prompt) for prompt in prompts]
        embeddings, _ = self.pipe.encode_prompt(texts, self.device, 1, do_classifier_free_guidance=False)
        return Conditioning(embeddings.to(self.dtype))

    def words(self, prompt: str) -> tuple[list[tuple[str, tuple[int, ...]]], int]:
        """The words of a prompt with the positions of their tokens in `embed`'s output, and how many positions there are.

        A word that does not fit has no positions. Punctuation marks are words of their own.
        """
        tokenizer = self.pipe.tokenizer
        length = tokenizer.model_max_length
        offsets = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        kept = len(self._cut(prompt))
        spans = _word_spans(prompt)
        places = [
            tuple(1 + i for i, (a, b) in enumerate(offsets) if a < end and b > start and end <= kept) for start, end in spans
        ]
        return [(prompt[start:end], tokens) for (start, end), tokens in zip(spans, places, strict=True)], length

    def schedule(self, num_inference_steps: int) -> NoiseSchedule:
        """A DDIM schedule from the pipeline's scheduler configuration, whatever class that scheduler is."""
        config = dict(self.pipe.scheduler.config)
        if "beta_start" not in config:
            name = type(self.pipe.scheduler).__name__
            raise ModelError(
                f"{name} has no betas; Stable Diffusion 1.x and 2.x need a scheduler of the DDPM family, e.g. DDIM"
            )
        # clip_sample and thresholding are for pixels and wreck latents; SD's own value is the default of set_alpha_to_one.
        config = {"set_alpha_to_one": False, **config, "clip_sample": False, "thresholding": False}
        scheduler = DDIMScheduler.from_config(config)
        levels = scheduler.config.num_train_timesteps
        scheduler.set_timesteps(min(num_inference_steps, levels))
        if num_inference_steps > levels or int(scheduler.timesteps.max()) >= levels:  # an offset can run over the end
            raise ModelError(
                f"num_inference_steps is {num_inference_steps}; this model was trained with {levels} levels, so use fewer steps"
            )
        final, kind = float(scheduler.final_alpha_cumprod), scheduler.config.prediction_type
        return NoiseSchedule.from_alphas(scheduler.alphas_cumprod, scheduler.timesteps.tolist(), final, kind)

    def check_pixels(self, pixels: Tensor) -> tuple[Tensor, list[bool] | None]:
        """Run the pipeline's safety checker, if it has one, on pixels in [-1, 1]; flagged pictures come back black."""
        if getattr(self.pipe, "safety_checker", None) is None:
            return pixels, None
        unit = (pixels / 2 + 0.5).clamp(0, 1)
        array = unit.permute(0, 2, 3, 1).cpu().float().numpy()
        checked, flags = self.pipe.run_safety_checker(array, self.device, self.pipe.unet.dtype)
        return torch.from_numpy(checked).permute(0, 3, 1, 2).to(pixels) * 2 - 1, list(flags)

    def _fitting(self, prompt: str) -> str:
        """The prompt as far as the text encoder reads; warns of the words that do not fit."""
        kept = self._cut(prompt)
        if kept != prompt:
            tokenizer = self.pipe.tokenizer
            tokens = len(tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"])
            warnings.warn(
                f"the prompt has {tokens} tokens and the model reads {tokenizer.model_max_length - 2}; "
                f"these words are dropped: {prompt[len(kept) :].strip()!r}",
                EasyInvWarning,
                stacklevel=2,
            )
        return kept

    def _cut(self, prompt: str) -> str:
        """The prompt, cut after the last whole word the text encoder has room for, where it has words."""
        tokenizer = self.pipe.tokenizer
        room = tokenizer.model_max_length - 2  # start and end
        offsets = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        if len(offsets) <= room:
            return prompt
        end = offsets[room][0]
        if end and not prompt[end - 1].isspace() and not prompt[end].isspace():
            end = len(re.sub(r"\s\S*$", "", prompt[:end]))  # scripts without spaces are cut in the middle, as CLIP does
        return prompt[:end].rstrip()


def same_model(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two identities are of one model; weights may differ by rounding to bfloat16."""
    if a.get("family") != b.get("family") or len(a.get("probe", ())) != len(b.get("probe", ())):
        return False
    return all(math.isclose(x, y, rel_tol=1e-2, abs_tol=1e-6) for x, y in zip(a["probe"], b["probe"], strict=True))


def _word_spans(text: str) -> list[tuple[int, int]]:
    """Where each word begins and ends: letters, digits and their accents, with apostrophes and hyphens inside; any other sign
    that is no space is a word of its own."""
    letter = [unicodedata.category(c)[0] in "LNM" or c == "_" for c in text]
    inside = [
        letter[i] or (c in "'\u2019-" and 0 < i < len(text) - 1 and letter[i - 1] and letter[i + 1]) for i, c in enumerate(text)
    ]
    spans: list[tuple[int, int]] = []
    for i, c in enumerate(text):
        if inside[i] and i and inside[i - 1] and spans:
            spans[-1] = (spans[-1][0], i + 1)
        elif not c.isspace():
            spans.append((i, i + 1))
    return spans


@contextmanager
def _float32_vae(vae: Any) -> Iterator[Any]:
    """The VAE in float32 where it is float16, whose range its activations leave; cast back, without loss, afterwards."""
    half = vae.dtype == torch.float16
    try:
        yield nn.Module.to(vae, torch.float32) if half else vae  # diffusers' own `to` logs a warning about the cast
    finally:
        if half:
            nn.Module.to(vae, torch.float16)
