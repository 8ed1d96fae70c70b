"""Stable Diffusion 1.x and 2.x (epsilon and v prediction) behind the Backbone protocol.

A thin adapter over the parts of a diffusers pipeline: nothing is cast, copied or replaced, so the user's LoRA, ControlNet,
IP-Adapter, autoencoder, quantisation, offload and scheduler stay theirs. Latents are float32 whatever the UNet's dtype (float64
for a float64 UNet). Other families of the same kind say here what differs: `serves`, `encode_text`, `framed`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from easyinv_edit.backbones import autoencoder, guests
from easyinv_edit.backbones.schedules import check_overrides, ddim_schedule
from easyinv_edit.backbones.text import WordTokens, fitting, words
from easyinv_edit.conditioning import Conditioning, Framing, concatenate
from easyinv_edit.denoiser import Prompt
from easyinv_edit.errors import InputError
from easyinv_edit.schedule import NoiseSchedule

PARTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")


class StableDiffusion:
    """Adapter over a loaded pipeline with `vae`, `text_encoder`, `tokenizer`, `unet` and `scheduler`.

    schedule: what of the scheduler's configuration is decided otherwise, by diffusers' names, e.g. timestep_spacing.
    """

    family: ClassVar[str] = "sd"
    needs_pooled: ClassVar[bool] = False

    def __init__(self, pipe: Any, schedule: Mapping[str, Any] | None = None) -> None:
        self.pipe = pipe
        self._overrides = check_overrides(schedule or {})
        self._settled: tuple[torch.device, torch.dtype] | None = None

    @staticmethod
    def serves(pipe: Any) -> bool:
        """Whether `pipe` looks like SD 1.x / 2.x text-to-image: one text encoder, four latent channels in the UNet."""
        return has_parts(pipe, PARTS) and getattr(pipe, "text_encoder_2", None) is None

    @property
    def network(self) -> nn.Module:
        """The UNet."""
        return self.pipe.unet

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Inside, `device` and `network_dtype` are asked once: diffusers walks through the whole model for either.

        Whoever finds them unasked asks and forgets; another thread that is inside meanwhile asks for itself from then on.
        """
        asks = self._settled is None
        if asks:
            self._settled = (self.device, self.network_dtype)
        try:
            yield
        finally:
            if asks:
                self._settled = None

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes, right under offload too."""
        return known[0] if (known := self._settled) else self.pipe._execution_device

    @property
    def network_dtype(self) -> torch.dtype:
        """Dtype the UNet computes in."""
        return known[1] if (known := self._settled) else self.pipe.unet.dtype

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of latents: at least float32."""
        return torch.promote_types(torch.float32, self.network_dtype)

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

    @property
    def embeds_guidance(self) -> bool:
        """Whether the UNet was distilled with its guidance scale as an input (LCM), so that no row needs a twin."""
        return self.pipe.unet.config.time_cond_proj_dim is not None

    def identity(self) -> dict[str, Any]:
        """What tells this model from another, stored in inversion files: its name and a few UNet weights.

        Compare with `same_model`: a model keeps its identity under any dtype, quantised (the probed layers never are), with
        LoRA loaded, and wherever its folder lies.
        """
        unet = self.pipe.unet
        weights = [_weight(layer) for layer in (unet.conv_in, unet.conv_norm_out, unet.conv_out)]
        probe = [value for w in weights for value in w.detach().float().flatten()[:: max(1, w.numel() // 8)][:8].tolist()]
        return {"family": self.family, "name": str(self.pipe.config.get("_name_or_path") or ""), "probe": probe}

    def predict(self, z: Tensor, timestep: int | Tensor, conditioning: Conditioning) -> Tensor:
        """Raw UNet output (rows, C, H, W) in the latents' dtype; timestep: one for all rows, or (rows,)."""
        dtype = self.network_dtype
        label = torch.as_tensor(timestep, device=z.device)
        added = self.added(conditioning)
        inputs = guests.residuals(self.pipe, z, label, conditioning, added, dtype)
        inputs |= guests.guidance_embedding(self.pipe, conditioning, dtype)
        if conditioning.images:
            added["image_embeds"] = [image.to(z.device, dtype) for image in conditioning.images]
        text = conditioning.embeddings.to(dtype)
        inputs |= {"added_cond_kwargs": added} if added else {}
        return self.pipe.unet(z.to(dtype), label, encoder_hidden_states=text, return_dict=False, **inputs)[0].to(z.dtype)

    def added(self, conditioning: Conditioning) -> dict[str, Any]:
        """What the family adds to the text: nothing here."""
        return {}

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (rows, 3, H, W) in [-1, 1] -> latents of the posterior's mode, scaled. Float32 VAE where it is half."""
        return autoencoder.encode(self.pipe.vae, pixels.to(self.device)).to(self.dtype)

    def decode(self, z: Tensor) -> Tensor:
        """Latents -> pixels (rows, 3, H, W) in about [-1, 1], float32."""
        return autoencoder.decode(self.pipe.vae, z)

    def embed(self, prompts: Sequence[Prompt | None], framings: Sequence[Framing | None] | None = None) -> Conditioning:
        """Encode prompts as the pipeline itself would, one row each; warns, naming the words that do not fit.

        prompts: texts, or embeddings of one row each in their place; None is what guidance moves away from where no negative
        prompt is given. framings: how each row's picture came to its size, by default whole and at the model's own.
        """
        texts = [prompt for prompt in prompts if not isinstance(prompt, Conditioning)]
        encoded = self.encode_text([text if text is None else fitting(self.pipe, text) for text in texts]) if texts else None
        rows = iter(() if encoded is None else (encoded.select([i]) for i in range(encoded.rows)))
        joined = concatenate([self._usable(p) if isinstance(p, Conditioning) else next(rows) for p in prompts])
        whole = Framing(self.native_size, (0, 0), self.native_size)
        framed = self.framed(joined, [f or whole for f in framings or [None] * len(prompts)])
        blank = {name: part.expand(framed.rows, *part.shape[1:]) for name, part in guests.no_image_parts(self.pipe).items()}
        return framed.having(blank)

    def encode_text(self, prompts: Sequence[str | None]) -> Conditioning:
        """Texts that fit, or None for the unconditional one, which is the empty prompt here."""
        texts = [prompt or "" for prompt in prompts]
        embeddings = self.pipe.encode_prompt(
            prompt=texts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )[0]
        return Conditioning(embeddings.to(self.dtype))

    def framed(self, conditioning: Conditioning, framings: Sequence[Framing]) -> Conditioning:
        """Add what the model is told of its pictures' sizes: nothing here."""
        return conditioning

    def guests(
        self, size: tuple[int, int], *, ip_adapter_image: Any = None, control_image: Any = None, scale: Any = 1.0
    ) -> dict[str, Tensor]:
        """The parts of one row's conditioning for the user's IP-Adapters and ControlNets. Raises InputError without them.

        size: (height, width) of the picture; scale: of ControlNet's residuals.
        """
        parts = {} if ip_adapter_image is None else guests.image_parts(self.pipe, ip_adapter_image)
        return parts | ({} if control_image is None else guests.hint_parts(self.pipe, control_image, scale, size))

    def words(self, prompt: Prompt) -> WordTokens:
        """The words of a prompt with the positions of their tokens in `embed`'s output, and how many positions there are.

        A word that does not fit has no positions, and embeddings have no words. Punctuation marks are words of their own.
        """
        return ([], prompt.embeddings.shape[1]) if isinstance(prompt, Conditioning) else words(self.pipe, prompt)

    def schedule(self, num_inference_steps: int) -> NoiseSchedule:
        """A DDIM schedule from the pipeline's scheduler configuration, whatever class that scheduler is."""
        return ddim_schedule(self.pipe.scheduler, num_inference_steps, self._overrides)

    def check_pixels(self, pixels: Tensor) -> tuple[Tensor, list[bool] | None]:
        """Run the pipeline's safety checker, if it has one, on pixels in [-1, 1]; flagged pictures come back black."""
        if getattr(self.pipe, "safety_checker", None) is None:
            return pixels, None
        unit = (pixels / 2 + 0.5).clamp(0, 1)
        array = unit.permute(0, 2, 3, 1).cpu().float().numpy()
        checked, flags = self.pipe.run_safety_checker(array, self.device, self.network_dtype)
        return torch.from_numpy(checked).permute(0, 3, 1, 2).to(pixels) * 2 - 1, list(flags)

    def release(self) -> None:
        """Let offloaded parts leave the accelerator, as a pipeline does at the end of a call."""
        self.pipe.maybe_free_model_hooks()

    def _usable(self, given: Conditioning) -> Conditioning:
        """Embeddings that stand for a prompt, on the model's device. Raises InputError where they are another model's."""
        width = self.pipe.unet.config.cross_attention_dim
        width = width[0] if isinstance(width, list | tuple) else width
        if given.rows != 1 or given.embeddings.ndim != 3 or given.embeddings.shape[2] != width:
            shape = tuple(given.embeddings.shape)
            raise InputError(f"prompt embeddings are {shape}; this model reads (1, tokens, {width}), one Conditioning a prompt")
        if (given.pooled is not None) != self.needs_pooled:
            wanted = "also needs pooled embeddings" if self.needs_pooled else "reads no pooled embeddings"
            raise InputError(f"prompt embeddings: this model {wanted}; make them with its own encode_prompt")
        return Conditioning(given.embeddings, given.pooled).to(self.device, self.dtype)


def _weight(layer: Any) -> Tensor:
    """A layer's weight, also where sequential offload keeps it elsewhere."""
    return layer._hf_hook.weights_map["weight"] if layer.weight.device.type == "meta" else layer.weight


def has_parts(pipe: Any, names: Sequence[str]) -> bool:
    """Whether a pipeline has these parts, and a UNet that takes the latents alone and no class."""
    if any(getattr(pipe, name, None) is None for name in names) or pipe.unet.config.class_embed_type is not None:
        return False
    return bool(pipe.unet.config.in_channels == pipe.vae.config.latent_channels)


def same_model(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two identities are of one model; weights may differ by rounding to bfloat16."""
    if a.get("family") != b.get("family") or len(a.get("probe", ())) != len(b.get("probe", ())):
        return False
    return all(math.isclose(x, y, rel_tol=1e-2, abs_tol=1e-6) for x, y in zip(a["probe"], b["probe"], strict=True))
