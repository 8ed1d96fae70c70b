"""LPIPS, CLIP score and DINO structure distance on random weights: explicit rewrites, torchmetrics, masks and bad files."""

from __future__ import annotations

import json
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pytest
import torch
import torchmetrics.functional.image.lpips as theirs
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextModel, CLIPVisionConfig, ViTConfig, ViTModel

from easyinv_edit.errors import EasyInvWarning, InputError
from easyinv_edit.evaluation.clip_score import CLIPScore, vit_name
from easyinv_edit.evaluation.dino import StructureDistance
from easyinv_edit.evaluation.lpips import BACKBONES, LPIPS, Net
from easyinv_edit.evaluation.metrics import black_outside, check_pictures
from easyinv_edit.evaluation.weights import METRICS, Weights, load
from easyinv_edit.tabletop.networks import END, TOKENS, build_tokenizer

NETS: tuple[Net, ...] = ("vgg", "alex", "squeeze")
Files = Callable[[Net], tuple[Path, Path]]
Tensors = dict[str, Tensor]
PROMPTS = ["a red cube on a wooden table", "a blue ball on a white background"]
each_net = pytest.mark.parametrize("net", NETS)


def pictures(height: int = 48, width: int = 48, rows: int = 2) -> tuple[Tensor, Tensor]:
    """Two batches of pictures that a file of bytes can hold."""
    levels = torch.randint(256, (2, rows, 3, height, width), generator=torch.Generator().manual_seed(3))
    a, b = levels.float() / 255
    return a, b


def half(height: int = 48, width: int = 48) -> Tensor:
    mask = torch.zeros(1, 1, height, width)
    mask[..., : width // 2] = 1
    return mask


# LPIPS

CONVOLUTIONS: dict[Net, dict[int, tuple[int, int, int]]] = {
    "vgg": {0: (3, 64, 3), 2: (64, 64, 3), 5: (64, 128, 3), 7: (128, 128, 3), 10: (128, 256, 3), 12: (256, 256, 3)}
    | {14: (256, 256, 3), 17: (256, 512, 3)}
    | dict.fromkeys((19, 21, 24, 26, 28), (512, 512, 3)),
    "alex": {0: (3, 64, 11), 3: (64, 192, 5), 6: (192, 384, 3), 8: (384, 256, 3), 10: (256, 256, 3)},
    "squeeze": {0: (3, 64, 3)},
}
"""Channels in and out and side of torchvision's convolutions, by their number in `features`."""
FIRES = {3: (64, 16, 64), 4: (128, 16, 64), 6: (128, 32, 128), 7: (256, 32, 128)}
FIRES |= {9: (256, 48, 192), 10: (384, 48, 192), 11: (384, 64, 256), 12: (512, 64, 256)}
WIDTHS = {"vgg": (64, 128, 256, 512, 512), "alex": (64, 192, 384, 256, 256), "squeeze": (64, 128, 256, 384, 384, 512, 512)}


def random_backbone(net: Net) -> Tensors:
    """Weights under torchvision's names that keep features alive, with a classifier that LPIPS must ignore."""
    shapes = {f"features.{i}": (out, into, k, k) for i, (into, out, k) in CONVOLUTIONS[net].items()}
    if net == "squeeze":
        for i, (into, thin, wide) in FIRES.items():
            shapes |= {f"features.{i}.squeeze": (thin, into, 1, 1), f"features.{i}.expand1x1": (wide, thin, 1, 1)}
            shapes |= {f"features.{i}.expand3x3": (wide, thin, 3, 3)}
    generator = torch.Generator().manual_seed(0)
    tensors = {"classifier.1.weight": torch.zeros(4, 4)}
    for name, shape in shapes.items():
        tensors[f"{name}.weight"] = torch.randn(shape, generator=generator) * (2 / math.prod(shape[1:])) ** 0.5
        tensors[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)
    return tensors


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Random backbone and heads of a net, made once: heads as .pth, backbone as .pth for AlexNet, else as safetensors."""
    folder = tmp_path_factory.mktemp("lpips")

    def made(net: Net) -> tuple[Path, Path]:
        backbone, heads = folder / f"{net}-backbone.{'pth' if net == 'alex' else 'safetensors'}", folder / f"{net}.pth"
        if not heads.exists():
            tensors = random_backbone(net)
            torch.save(tensors, backbone) if net == "alex" else save_file(tensors, backbone)
            rows = enumerate(torch.rand(1, width, 1, 1, generator=torch.Generator().manual_seed(1)) for width in WIDTHS[net])
            torch.save({f"lin{i}.model.1.weight": row for i, row in rows}, heads)
        return backbone, heads

    return made


def tensors_of(path: Path) -> Tensors:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def explicit_features(net: Net, w: Tensors, x: Tensor) -> list[Tensor]:
    """What LPIPS compares, written out layer by layer."""

    def conv(x: Tensor, name: str, **options: int) -> Tensor:
        return functional.relu(functional.conv2d(x, w[f"features.{name}.weight"], w[f"features.{name}.bias"], **options))

    def fire(x: Tensor, i: int) -> Tensor:
        thin = conv(x, f"{i}.squeeze")
        return torch.cat([conv(thin, f"{i}.expand1x1"), conv(thin, f"{i}.expand3x3", padding=1)], 1)

    if net == "vgg":
        made = []
        for block in ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)):
            x = functional.max_pool2d(x, 2) if made else x
            for i in block:
                x = conv(x, str(i), padding=1)
            made.append(x)
        return made
    if net == "alex":
        first = conv(x, "0", stride=4, padding=2)
        second = conv(functional.max_pool2d(first, 3, 2), "3", padding=2)
        third = conv(functional.max_pool2d(second, 3, 2), "6", padding=1)
        fourth = conv(third, "8", padding=1)
        return [first, second, third, fourth, conv(fourth, "10", padding=1)]
    made = [conv(x, "0", stride=2)]
    for pooled, block in ((True, (3, 4)), (True, (6, 7)), (True, (9,)), (False, (10,)), (False, (11,)), (False, (12,))):
        x = functional.max_pool2d(made[-1], 3, 2, ceil_mode=True) if pooled else made[-1]
        for i in block:
            x = fire(x, i)
        made.append(x)
    return made


def explicit_lpips(net: Net, backbone: Tensors, heads: Tensors, a: Tensor, b: Tensor) -> Tensor:
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    features = [
        explicit_features(net, backbone, ((x * 2 - 1).permute(0, 2, 3, 1) - shift).div(scale).permute(0, 3, 1, 2))
        for x in (a, b)
    ]
    total = torch.zeros(len(a))
    for i, (x, y) in enumerate(zip(*features, strict=True)):
        apart = (functional.normalize(x, dim=1) - functional.normalize(y, dim=1)) ** 2
        total += functional.conv2d(apart, heads[f"lin{i}.model.1.weight"]).mean((1, 2, 3))
    return total


@each_net
def test_lpips_is_the_explicit_one(files: Files, net: Net) -> None:
    a, b = pictures(48, 56)
    distances = LPIPS(net, *files(net))(a, b)
    assert distances.shape == (2,)
    assert distances.dtype == torch.float32
    expected = explicit_lpips(net, *(tensors_of(path) for path in files(net)), a, b)
    assert (expected > 0.01).all()
    torch.testing.assert_close(distances, expected, rtol=1e-4, atol=1e-6)


@each_net
def test_lpips_is_that_of_torchmetrics_with_the_published_heads(
    files: Files, net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, _ = files(net)
    heads = Path(theirs.__file__).parent / "lpips_models" / f"{net}.pth"

    def features(_name: str, _pretrained: bool = False, **_options: Any) -> nn.Sequential:
        layers = nn.Sequential(*BACKBONES[net].build())
        own = {key.removeprefix("features."): v for key, v in tensors_of(backbone).items() if key.startswith("features.")}
        layers.load_state_dict(own)
        return layers

    monkeypatch.setattr(theirs, "_get_tv_model_features", features)
    a, b = pictures(48, 56)
    with torch.no_grad():
        expected = theirs._LPIPS(pretrained=True, net=net, pnet_rand=True)(a * 2 - 1, b * 2 - 1).flatten()
    torch.testing.assert_close(LPIPS(net, backbone, heads)(a, b), expected, rtol=1e-4, atol=1e-6)


def test_lpips_reads_both_file_formats_alike(files: Files, tmp_path: Path) -> None:
    (backbone, heads), (a, b) = files("squeeze"), pictures()
    torch.save(tensors_of(backbone), tmp_path / "backbone.pth")
    save_file(tensors_of(heads), tmp_path / "heads.safetensors")
    other = LPIPS("squeeze", tmp_path / "backbone.pth", str(tmp_path / "heads.safetensors"))
    assert torch.equal(other(a, b), LPIPS("squeeze", backbone, heads)(a, b))


def test_lpips_is_a_distance_of_each_pair(files: Files) -> None:
    lpips, (a, b) = LPIPS("squeeze", *files("squeeze")), pictures()
    assert torch.equal(lpips(a, a), torch.zeros(2))
    torch.testing.assert_close(lpips(a, b), lpips(b, a))
    torch.testing.assert_close(lpips(a, b), torch.cat([lpips(a[:1], b[:1]), lpips(a[1:], b[1:])]))
    assert torch.equal(lpips(a.double(), b.double()), lpips(a, b))
    assert lpips(a, (a + 0.02 * (b - a)))[0] < lpips(a, b)[0]


def test_lpips_names_its_net(files: Files) -> None:
    assert [LPIPS(net, *files(net)).name for net in ("alex", "squeeze")] == ["LPIPS (alex)", "LPIPS (squeeze)"]


def test_a_mask_blackens_both_pictures_and_an_empty_one_has_no_score(files: Files) -> None:
    lpips, (a, b), mask = LPIPS("squeeze", *files("squeeze")), pictures(), half()
    assert torch.equal(lpips(a, b, mask), lpips(a * mask, b * mask))
    assert torch.equal(lpips(a, a * mask, mask), torch.zeros(2))
    scores = lpips(a, b, torch.cat([mask, torch.zeros_like(mask)]))
    assert scores[0] == lpips(a, b, mask)[0]
    assert math.isnan(scores[1])


@each_net
def test_the_least_picture_of_each_net(files: Files, net: Net) -> None:
    lpips, least = LPIPS(net, *files(net)), {"vgg": 16, "alex": 31, "squeeze": 17}[net]
    a, b = pictures(least, least + 2)
    assert lpips(a, b).isfinite().all()
    with pytest.raises(InputError, match=rf"pictures of {least + 2} x {least - 1}; its least side is {least}"):
        lpips(a[..., 1:, :], b[..., 1:, :])


BAD_PICTURES: list[tuple[Callable[[Tensor], Tensor], str]] = [
    (lambda x: x * 2 - 1, r"values from -1 to 1; give values in \[0, 1\]"),
    (lambda x: x * 255, "values from 0 to 255"),
    (lambda x: torch.where(x > 0.5, math.nan, x), "values from nan to nan"),
    (lambda x: x[0], r"shape \(3, 48, 48\)"),
    (lambda x: x[:, :1], r"shape \(2, 1, 48, 48\)"),
    (lambda x: x[..., 1:], r"shape \(2, 3, 48, 48\) and \(2, 3, 48, 47\)"),
]


@pytest.mark.parametrize(("change", "says"), BAD_PICTURES)
def test_other_pictures_are_refused(change: Callable[[Tensor], Tensor], says: str) -> None:
    a, _ = pictures()
    a[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    good = a if "and" in says else change(a)
    check_pictures(a, a)
    with pytest.raises(InputError, match=says):
        check_pictures(good, change(a))


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(InputError, match=r"a mask of shape \(1, 1, 24, 24\) for pictures of \(2, 3, 48, 48\)"):
        black_outside(pictures()[0], half(24, 24))


class Harmful:
    """A pickle that would make a folder when it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


BACKBONE_FROM = "download squeezenet1_1-b8a52dc0.pth from https://download.pytorch.org/models/"
HEADS_FROM = "download squeeze.pth from https://github.com/richzhang/PerceptualSimilarity"

WRONG_FILES = ("none.pth", "garbage.pth", "garbage.safetensors", "empty.pth", "list.pth", "harmful.pth", "other")


@pytest.mark.parametrize("which", ["backbone", "heads"])
@pytest.mark.parametrize(
    "kind", ["none", "garbage.pth", "garbage.safetensors", "empty.pth", "list.pth", "harmful.pth", "other"]
)
def test_a_wrong_weights_file_is_refused_in_one_line_that_says_what_to_download(
    files: Files, tmp_path: Path, which: str, kind: str
) -> None:
    backbone, heads = files("squeeze")
    bad = tmp_path / kind
    if kind.startswith(("garbage", "empty")):
        bad.write_bytes(b"no weights" if kind.startswith("garbage") else b"")
    elif kind == "list.pth":
        torch.save([torch.zeros(2)], bad)
    elif kind == "harmful.pth":
        bad.write_bytes(pickle.dumps({"features.0.weight": Harmful(tmp_path / "harm")}, protocol=2))
    elif kind == "other":
        bad = heads if which == "backbone" else files("alex")[1]
    given = (bad, heads) if which == "backbone" else (backbone, bad)
    with pytest.raises(InputError) as caught:
        LPIPS("squeeze", *given)
    text = str(caught.value)
    assert text.startswith(f"{bad}: ")
    assert (BACKBONE_FROM if which == "backbone" else HEADS_FROM) in text
    assert "\n" not in text
    assert "Re-running" not in text
    assert not (tmp_path / "harm").exists()


def test_an_unknown_net_is_refused(files: Files) -> None:
    with pytest.raises(InputError, match="net 'resnet' is unknown; choose vgg, alex, squeeze"):
        LPIPS(cast(Net, "resnet"), *files("squeeze"))


# CLIP

SIDE = 32


def tiny_clip(negated: bool = False) -> CLIPModel:
    tokenizer = build_tokenizer()
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": TOKENS, "eos_token_id": tokenizer.eos_token_id}
    ends = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    vision = {"image_size": SIDE, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=shared | text | ends, vision_config=shared | vision, projection_dim=16)).eval()
    for name, parameter in model.named_parameters():  # at the usual initial values every score is about the same
        parameter.data += 0.2 * torch.randn(parameter.shape)
        if name.endswith(("_projection.weight", "final_layer_norm.bias", "post_layernorm.bias")):
            parameter.data += 0.1 if "projection" in name else 1  # a direction in common, so that scores are positive
    if negated:
        model.text_projection.weight.data *= -1
    return model


def save_clip(model: CLIPModel, folder: Path) -> Path:
    """A model folder whose image processor is written as OpenAI's checkpoints have it."""
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    known = CLIPImageProcessorPil()
    content = {"do_resize": True, "do_center_crop": True, "do_normalize": True, "size": SIDE, "crop_size": SIDE, "resample": 3}
    content |= {"feature_extractor_type": "CLIPFeatureExtractor", "image_mean": known.image_mean, "image_std": known.image_std}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tiny_clip(), tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(clip_folder: Path) -> CLIPScore:
    return CLIPScore(clip_folder)


@torch.no_grad()
def explicit_cosines(model: CLIPModel, given: Tensor, ids: list[list[int]]) -> Tensor:
    """Cosines of pictures and token numbers, preprocessed by hand: bicubic to the shorter side, centred, normalised."""
    mean, deviation = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    found = []
    for picture, numbers in zip(given, ids, strict=True):
        image = Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy())
        scale = SIDE / min(image.size)
        image = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BICUBIC)
        x, y = (image.width - SIDE) // 2, (image.height - SIDE) // 2
        array = (np.asarray(image.crop((x, y, x + SIDE, y + SIDE))) / 255 - mean) / deviation
        pixels = torch.from_numpy(array).float().permute(2, 0, 1)[None]
        seen = model.visual_projection(model.vision_model(pixels).pooler_output)
        text = getattr(model.text_model, "text_model", model.text_model)
        read = model.text_projection(text(torch.tensor([numbers])).pooler_output)
        found.append((seen * read).sum() / seen.norm() / read.norm())
    return torch.stack(found)


@pytest.mark.parametrize("size", [(48, 48), (64, 44), (20, 24)])
def test_clip_score_is_a_hundred_cosines_by_hand(clip_folder: Path, size: tuple[int, int]) -> None:
    given, _ = pictures(*size)
    tokenizer, model = build_tokenizer(), tiny_clip()
    expected = 100 * explicit_cosines(model, given, [tokenizer(prompt)["input_ids"] for prompt in PROMPTS])
    opposite = CLIPScore(save_clip(tiny_clip(negated=True), clip_folder.parent / f"negated-{size[0]}"))
    scores, negated = CLIPScore(clip_folder)(given, PROMPTS), opposite(given, PROMPTS)
    assert scores.shape == (2,)
    torch.testing.assert_close(scores, expected.clamp(min=0), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(negated, (-expected).clamp(min=0), rtol=1e-4, atol=1e-3)
    assert (scores > 1).all()
    assert torch.equal(negated, torch.zeros(2))


def test_prompts_of_different_lengths_do_not_disturb_each_other(clip: CLIPScore) -> None:
    given, _ = pictures()
    prompts = ["a cube", PROMPTS[0]]
    alone = torch.cat([clip(given[i : i + 1], [prompt]) for i, prompt in enumerate(prompts)])
    torch.testing.assert_close(clip(given, prompts), alone, rtol=1e-4, atol=1e-4)


def test_the_edited_region_is_the_picture_on_black(clip: CLIPScore) -> None:
    (given, _), mask = pictures(), half()
    scores = clip(given, PROMPTS, torch.cat([mask, torch.zeros_like(mask)]))
    assert scores[0] == clip(given * mask, PROMPTS)[0]
    assert scores[0] != clip(given, PROMPTS)[0]
    assert math.isnan(scores[1])


def test_a_long_prompt_is_cut_with_a_warning_and_keeps_its_end(clip: CLIPScore) -> None:
    given, _ = pictures(rows=1)
    prompt = " ".join(["red"] * 40)
    tokenizer = build_tokenizer()
    cut = [*tokenizer(prompt)["input_ids"][: TOKENS - 1], tokenizer.convert_tokens_to_ids(END)]
    with pytest.warns(EasyInvWarning, match=rf"a prompt of 42 tokens is cut to {TOKENS}: 'red red") as caught:
        scores = clip(given, [prompt])
    assert caught[0].filename == __file__
    expected = 100 * explicit_cosines(tiny_clip(), given, [cut])
    torch.testing.assert_close(scores, expected.clamp(min=0), rtol=1e-4, atol=1e-3)


def test_clip_wants_one_prompt_per_picture(clip: CLIPScore) -> None:
    given, _ = pictures()
    for prompts, says in ((PROMPTS[:1], "1 prompts for 2 pictures"), (PROMPTS[0], "one text for 2 pictures")):
        with pytest.raises(InputError, match=says):
            clip(given, prompts)


def test_half_precision_weights_are_computed_in_float32(tmp_path: Path, clip: CLIPScore) -> None:
    given, _ = pictures()
    halved = CLIPScore(save_clip(tiny_clip().half(), tmp_path / "half"))
    torch.testing.assert_close(halved(given, PROMPTS), clip(given, PROMPTS), rtol=0.02, atol=0.2)
    assert halved(given, PROMPTS).dtype == torch.float32
    assert next(halved._model.parameters()).dtype == torch.float32


def test_nets_are_called_as_the_field_calls_them(clip: CLIPScore) -> None:
    assert clip.name == "CLIP (ViT-32/8)"
    assert vit_name(CLIPVisionConfig(hidden_size=1024, patch_size=14, num_attention_heads=16)) == "ViT-L/14"
    assert vit_name(ViTConfig(hidden_size=768, patch_size=8)) == "ViT-B/8"


@pytest.mark.parametrize("kind", ["nothing", "text only", "no processor", "no tokenizer", "damaged"])
def test_a_folder_that_is_no_whole_clip_model_is_refused(clip_folder: Path, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "clip"
    if kind == "text only":
        CLIPTextModel(tiny_clip().config.text_config).save_pretrained(folder)
        build_tokenizer().save_pretrained(folder)
    elif kind != "nothing":
        save_clip(tiny_clip(), folder)
    for path in {"no processor": ["preprocessor_config.json"], "no tokenizer": ["tokenizer.json"]}.get(kind, []):
        (folder / path).unlink()
    if kind == "damaged":
        (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(InputError) as caught:
        CLIPScore(folder)
    assert str(caught.value).startswith(f"{folder}: ")
    assert "download openai/clip-vit-large-patch14" in str(caught.value)
    assert "\n" not in str(caught.value)


# DINO


def tiny_vit() -> ViTModel:
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(image_size=SIDE, patch_size=8, **shared)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without the pooling layer, which DINO has no weights for."""
    folder, model = tmp_path_factory.mktemp("dino"), tiny_vit()
    bare = ViTModel(model.config, add_pooling_layer=False)
    bare.load_state_dict(model.state_dict(), strict=False)
    bare.save_pretrained(folder)
    return folder


@torch.no_grad()
def explicit_structure(small: Tensor, compat: bool) -> Tensor:
    """Self-similarities (B, 17, 17) of pictures of the network's size in [0, 1], from the last block's input."""
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (small * (255 if compat else 1)).permute(0, 2, 3, 1).sub(mean).div(deviation).permute(0, 3, 1, 2)
    model = tiny_vit()
    before = model(pixels, output_hidden_states=True).hidden_states[2]
    last = next(module for name, module in model.named_modules() if name.endswith(("layers.2", "layer.2")))
    weights = {name.split("attention.")[-1]: value for name, value in last.named_parameters()}
    name = "k_proj" if "k_proj.weight" in weights else "key"
    keys = last.layernorm_before(before) @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
    return functional.cosine_similarity(keys[:, :, None], keys[:, None], dim=-1)


def resized(given: Tensor, kind: Literal["mean of four", "PIL"]) -> Tensor:
    if kind == "mean of four":
        return functional.avg_pool2d(given, 2)
    rows = [[Image.fromarray(c.numpy()).resize((SIDE, SIDE), Image.Resampling.BILINEAR) for c in row] for row in given]
    return torch.stack([torch.stack([torch.from_numpy(np.array(c)) for c in row]) for row in rows])


@pytest.mark.parametrize("compat", [True, False])
def test_structure_distance_is_the_explicit_one(vit_folder: Path, compat: bool) -> None:
    a, b = pictures(2 * SIDE, 2 * SIDE)
    # Halved without antialiasing, each value is the mean of four; with it, what PIL makes of floats.
    x, y = (explicit_structure(resized(each, "mean of four" if compat else "PIL"), compat) for each in (a, b))
    assert x.shape == (2, 17, 17)
    distances = StructureDistance(vit_folder, compat=compat)(a, b)
    expected = (x - y).square().mean((1, 2))
    assert (expected > 1e-5).all()
    torch.testing.assert_close(distances, expected, rtol=2e-3, atol=1e-7)


def test_the_two_scales_are_different_quantities_with_different_names(vit_folder: Path) -> None:
    a, b = pictures()
    official, meant = (StructureDistance(vit_folder, compat=compat) for compat in (True, False))
    assert [official.name, meant.name] == ["DINO structure (ViT-32/8, 0-255)", "DINO structure (ViT-32/8)"]
    assert not torch.isclose(official(a, b), meant(a, b), rtol=0.05).any()


def test_structure_distance_is_a_distance_of_each_pair(vit_folder: Path) -> None:
    distance, (a, b) = StructureDistance(vit_folder, compat=True), pictures(40, 56)
    assert torch.equal(distance(a, a), torch.zeros(2))
    torch.testing.assert_close(distance(a, b), distance(b, a))
    torch.testing.assert_close(distance(a, b), torch.cat([distance(a[:1], b[:1]), distance(a[1:], b[1:])]))


def test_structure_on_a_mask_is_that_of_the_pictures_on_black(vit_folder: Path) -> None:
    distance, (a, b), mask = StructureDistance(vit_folder, compat=False), pictures(), half()
    scores = distance(a, b, torch.cat([mask, torch.zeros_like(mask)]))
    assert scores[0] == distance(a * mask, b * mask)[0]
    assert math.isnan(scores[1])


def test_the_network_is_left_without_hooks(vit_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distance, (a, b) = StructureDistance(vit_folder, compat=True), pictures()
    distance(a, b)
    monkeypatch.setattr(distance._model, "forward", lambda **_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        distance(a, b)
    assert not any(module._forward_hooks for module in distance._model.modules())


OLD_NAMES = {
    "layers.": "encoder.layer.",
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def test_a_checkpoint_with_the_names_of_transformers_4_is_the_same_model(vit_folder: Path, tmp_path: Path) -> None:
    tiny_vit().save_pretrained(tmp_path)
    old = {}
    for key, value in tiny_vit().state_dict().items():
        for new, former in OLD_NAMES.items():
            key = key.replace(new, former)
        old[key] = value
    assert any("encoder.layer.2.attention.attention.key.weight" in key for key in old)
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    a, b = pictures()
    distances = [StructureDistance(folder, compat=True)(a, b) for folder in (tmp_path, vit_folder)]
    assert torch.equal(*distances)


@pytest.mark.parametrize("kind", ["nothing", "clip", "half of it"])
def test_a_folder_that_is_no_whole_vision_transformer_is_refused(
    vit_folder: Path, clip_folder: Path, tmp_path: Path, kind: str
) -> None:
    folder = clip_folder if kind == "clip" else tmp_path
    if kind == "half of it":
        tiny_vit().save_pretrained(folder)
        kept = {key: value for key, value in load_file(vit_folder / "model.safetensors").items() if "layer.2." not in key}
        kept = {key: value for key, value in kept.items() if "layers.2." not in key}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError) as caught:
        StructureDistance(folder, compat=True)
    assert str(caught.value).startswith(f"{folder}: ")
    assert "download facebook/dino-vitb8" in str(caught.value)
    assert "\n" not in str(caught.value)


# Which metrics a run can have


def test_a_run_has_the_metrics_whose_weights_are_there(
    files: Files, clip_folder: Path, vit_folder: Path, tmp_path: Path
) -> None:
    backbone, heads = files("squeeze")
    lpips = {"squeeze": {"backbone": str(backbone), "heads": str(heads)}, "vgg": {"backbone": "vgg.pth", "heads": str(heads)}}
    weights = Weights.from_mapping({"lpips": lpips, "clip": clip_folder.name}, clip_folder.parent)
    made = load(weights, METRICS)
    assert {name: metric for name, metric in made.items() if isinstance(metric, str)} == {
        "LPIPS (vgg)": f"no weights: {clip_folder.parent / 'vgg.pth'}",
        "LPIPS (alex)": "no weights: weights.lpips.alex is not given",
        "DINO structure": "no weights: weights.dino is not given",
        "DINO structure (0-255)": "no weights: weights.dino is not given",
    }
    (a, b), squeeze, clip = pictures(), cast(Any, made["LPIPS (squeeze)"]), cast(Any, made["CLIP"])
    assert torch.equal(squeeze(a, b), LPIPS("squeeze", backbone, heads)(a, b))
    assert torch.equal(clip(a, PROMPTS), CLIPScore(clip_folder)(a, PROMPTS))
    both = load(Weights(dino=vit_folder), ["DINO structure (0-255)", "DINO structure"])
    assert [cast(Any, metric).compat for metric in both.values()] == [True, False]
    assert load(Weights(clip=tmp_path / "none"), ["CLIP"]) == {"CLIP": f"no weights: {tmp_path / 'none'}"}


def test_weights_that_are_there_and_wrong_stop_the_run(files: Files) -> None:
    _, heads = files("squeeze")
    weights = Weights.from_mapping({"lpips": {"squeeze": {"backbone": str(heads), "heads": str(heads)}}})
    with pytest.raises(InputError, match="is not torchvision's backbone"):
        load(weights, ["LPIPS (squeeze)"])


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(InputError, match=r"metric 'LPIPS' is unknown; choose LPIPS \(vgg\).*did you mean"):
        load(Weights(), ["LPIPS"])


def test_problems_of_the_configuration_come_together_in_one_line() -> None:
    content = {"lpips": {"sqeeze": {"backbone": "b", "heads": "h"}, "vgg": {"backbone": "b"}}, "clip": 3, "vit": "v"}
    with pytest.raises(InputError) as caught:
        Weights.from_mapping(content)
    text = str(caught.value)
    assert "\n" not in text
    for problem in (
        "weights.lpips.sqeeze: should be 'vgg', 'alex' or 'squeeze'",
        "weights.lpips.vgg.heads: is missing",
        "weights.clip: ",
        "weights.vit: is not known here",
    ):
        assert problem in text
    with pytest.raises(InputError, match="weights"):
        Weights.from_mapping(cast(Any, ["clip"]))
