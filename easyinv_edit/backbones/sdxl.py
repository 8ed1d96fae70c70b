"""Stable Diffusion XL: what differs from Stable Diffusion 1.x and 2.x.

Two text encoders side by side, the second one's pooled output, and the size of the picture as a condition. Where no negative
prompt is given, guidance moves away from zeros, not from the encoding of "" (unless the model's own configuration says
otherwise). With an empty source prompt guidance is therefore NOT the identity here, as it is for Stable Diffusion 1.x: the
source branch keeps an unconditional row where guided targets read it. Give `negative_prompt=""` for the old meaning and one
row less.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from easyinv_edit.backbones.sd import PARTS, StableDiffusion, has_parts
from easyinv_edit.conditioning import Conditioning, Framing


class StableDiffusionXL(StableDiffusion):
    """Adapter over a loaded SDXL text-to-image pipeline: base, Turbo, Lightning, LCM and fine-tuned models; not the refiner."""

    family: ClassVar[str] = "sdxl"
    needs_pooled: ClassVar[bool] = True

    @staticmethod
    def serves(pipe: Any) -> bool:
        """Whether `pipe` has both text encoders and a UNet that is told sizes."""
        parts = has_parts(pipe, (*PARTS, "text_encoder_2", "tokenizer_2"))
        return parts and pipe.unet.config.addition_embed_type == "text_time"

    def encode_text(self, prompts: Sequence[str | None]) -> Conditioning:
        """Texts that fit, or None for the unconditional one: zeros where the pipeline's configuration says so."""
        texts = [prompt or "" for prompt in prompts]
        embeddings, _, pooled, _ = self.pipe.encode_prompt(
            prompt=texts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        zero = self.pipe.config.get("force_zeros_for_empty_prompt", True)
        kept = torch.tensor([not (prompt is None and zero) for prompt in prompts], device=embeddings.device)
        return Conditioning(
            torch.where(kept[:, None, None], embeddings, 0).to(self.dtype), torch.where(kept[:, None], pooled, 0).to(self.dtype)
        )

    def framed(self, conditioning: Conditioning, framings: Sequence[Framing]) -> Conditioning:
        """Add the micro-conditioning: original size, crop and target size, each (height, width) or (top, left) in pixels."""
        ids = [[*framing.original, *framing.crop, *framing.target] for framing in framings]
        return conditioning.having({"time_ids": torch.tensor(ids, dtype=self.dtype, device=self.device)})

    def added(self, conditioning: Conditioning) -> dict[str, Any]:
        """The pooled text and the sizes, as the UNet takes them."""
        assert conditioning.pooled is not None
        return {"text_embeds": conditioning.pooled.to(self.network_dtype), "time_ids": conditioning.time_ids}
