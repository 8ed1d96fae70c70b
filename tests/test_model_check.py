"""A model folder looked at without loading it: the report says what the loaded model says, and refuses what cannot load."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
    schedulers,
)
from safetensors.torch import save_file

from attention_control import list_sites
from easyinv_edit.backbones import load_pipeline, wrap
from easyinv_edit.errors import EasyInvError, ModelError
from easyinv_edit.model_check import WITH_BETAS, ModelReport, examine, examine_model
from easyinv_edit.model_configs import SchedulerConfig, UNetConfig, VAEConfig
from easyinv_edit.models import presets
from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.weight_files import Unreadable, read_header
from tests import models
from tests.test_models import PUBLISHED, SDXL


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A folder of every family's tiny model."""
    folders = {name: tmp_path_factory.mktemp(name) for name in models.FAMILIES}
    for name, build in models.FAMILIES.items():
        build().save_pretrained(folders[name])
    return folders


@pytest.fixture
def folder(saved: Mapping[str, Path], tmp_path: Path) -> Path:
    """A copy of the Stable Diffusion 1.x folder, to break."""
    return Path(shutil.copytree(saved["sd"], tmp_path / "model"))


def opened(folder: Path) -> Any:
    """The adapter over a folder, with a schedule, as an edit opens it."""
    backbone = wrap(load_pipeline(folder, local_files_only=True))
    backbone.schedule(4)
    return backbone


def change(file: Path, **values: Any) -> None:
    """Set keys of a JSON file; None takes a key out."""
    content = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.mark.parametrize("name", models.FAMILIES)
def test_the_report_is_what_the_loaded_model_says(saved: Mapping[str, Path], name: str) -> None:
    report, backbone = examine_model(saved[name]), opened(saved[name])
    pipe = backbone.pipe
    assert report.usable, report.problems
    assert report.family == backbone.family
    assert report.pipeline == type(pipe).__name__
    assert report.prediction_type == backbone.schedule(4).prediction_type
    assert report.native_size == backbone.native_size
    assert report.cross_attention_dim == pipe.unet.config.cross_attention_dim
    assert report.self_attention_sites == len(list_sites(pipe.unet)) == (70 if name == "sdxl" else 16)
    assert (report.guidance_embedded, report.zero_terminal_snr) == (backbone.embeds_guidance, False)
    networks = {key: part for key, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    assert {key: part.parameters for key, part in report.parts.items()} == {
        key: sum(p.numel() for p in part.parameters()) for key, part in networks.items()
    }
    assert {part.dtype for part in report.parts.values()} == {"float32"}
    files = [file for file in saved[name].rglob("*") if file.is_file()]
    assert report.bytes_on_disk == sum(len(file.read_bytes()) for file in files)
    assert sum(part.bytes for part in report.parts.values()) == sum(
        len(file.read_bytes()) for file in files if file.suffix == ".safetensors"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_type_on_disk_is_read_from_the_files(dtype: torch.dtype, tmp_path: Path) -> None:
    pipe = models.sd()
    pipe.unet.to(dtype)
    pipe.save_pretrained(tmp_path)
    parts = examine_model(tmp_path).parts
    assert (f"torch.{parts['unet'].dtype}", parts["vae"].dtype) == (str(dtype), "float32")


GIVEN = {**models.BETAS, "steps_offset": 1}
"""What published configurations say."""


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(
            **GIVEN, clip_sample=False, prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True
        ),
        DDIMScheduler(**GIVEN, clip_sample=False),
        PNDMScheduler(**GIVEN, skip_prk_steps=True),
        EulerDiscreteScheduler(**GIVEN, timestep_spacing="trailing"),
        EulerDiscreteScheduler(**GIVEN, timestep_spacing="linspace"),
        DPMSolverMultistepScheduler(**GIVEN),
    ],
)
def test_the_spacing_is_that_of_our_schedule(scheduler: Any, tmp_path: Path) -> None:
    """Also where the file leaves it out: the class's own default does not count."""
    models.sd(scheduler=scheduler).save_pretrained(tmp_path)
    report = examine_model(tmp_path)
    assert report.usable, report.problems
    stated = DDIMScheduler(timestep_spacing=report.timestep_spacing, steps_offset=1)
    stated.set_timesteps(7)
    assert opened(tmp_path).schedule(7).timesteps[1:] == tuple(reversed(stated.timesteps.tolist()))
    assert report.zero_terminal_snr == scheduler.config.get("rescale_betas_zero_snr", False)


def counted(unet: UNet2DConditionModel) -> int:
    """The sites by the configuration alone, as it is written to a file."""
    return UNetConfig(
        **{key: value for key, value in json.loads(unet.to_json_string()).items() if key in FIELDS}
    ).self_attention_sites


FIELDS = set(UNetConfig.__dataclass_fields__)
SMALL = {"sample_size": 8, "norm_num_groups": 4, "cross_attention_dim": 16, "attention_head_dim": 2}


@pytest.mark.parametrize(
    ("changes", "sites"),
    [
        ({}, 16),
        (SDXL, 70),
        ({**SMALL, "block_out_channels": (8,) * 4, "layers_per_block": 1}, 10),
        ({**SMALL, "block_out_channels": (8,) * 4, "layers_per_block": (1, 2, 3, 1)}, 16),
        ({**SMALL, "block_out_channels": (8,) * 4, "mid_block_type": None}, 15),
        ({**SMALL, "block_out_channels": (8,) * 4, "mid_block_type": "UNetMidBlock2D"}, 15),
        (
            {
                **SMALL,
                "block_out_channels": (8, 8),
                "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
                "transformer_layers_per_block": ((1, 2), (3, 4)),
                "reverse_transformer_layers_per_block": ((1, 2, 3), (1, 1, 1)),
            },
            3 + 7 + 3 + 6,
        ),
        (
            {
                **SMALL,
                "block_out_channels": (8, 8),
                "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
            },
            1,
        ),
    ],
)
def test_sites_are_counted_from_the_configuration(changes: dict[str, Any], sites: int) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**changes)
    assert counted(unet) == len(list_sites(unet)) == sites


def part_taken(name: str) -> Callable[[Path], None]:
    return lambda folder: shutil.rmtree(folder / name)


def cut(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def pickled(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    torch.save(models.sd_unet().state_dict(), weights.with_suffix(".bin"))


def varied(folder: Path) -> None:
    for file in [*folder.rglob("*.safetensors")]:
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))


def sharded(folder: Path) -> None:
    shutil.rmtree(folder / "unet")
    models.sd_unet().save_pretrained(folder / "unet", max_shard_size="100KB")


def a_shard_less(folder: Path) -> None:
    sharded(folder)
    next(iter(sorted((folder / "unet").glob("*.safetensors")))).unlink()


def replaced_unet(**changes: Any) -> Callable[[Path], None]:
    def put(folder: Path) -> None:
        shutil.rmtree(folder / "unet")
        models.sd_unet(**changes).save_pretrained(folder / "unet")

    return put


def keys(file: str, **values: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder / file, **values)


def gone(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


def written(file: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_text(text) and None


def flowing(folder: Path) -> None:
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    change(folder / "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])


SCHEDULER = "scheduler/scheduler_config.json"
BROKEN: list[tuple[Callable[[Path], Any], str]] = [
    (part_taken("vae"), "vae: there is no such folder, but model_index.json lists it (AutoencoderKL); download it again"),
    (part_taken("tokenizer"), "tokenizer: there is no such folder"),
    (gone("tokenizer/tokenizer.json"), "tokenizer: has no vocabulary (tokenizer.json, vocab.json, spiece.model)"),
    (gone("unet/config.json"), "unet: has no config.json"),
    (gone("vae/config.json"), "vae: has no config.json"),
    (gone(SCHEDULER), "scheduler: has no scheduler_config.json"),
    (keys("model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"]), "or write [null, null]"),
    (keys("model_index.json", vae=[None, None]), "model_index.json lists no vae"),
    (keys("model_index.json", _class_name=["pipeline.py", "Own"]), "code that comes with a model is never run"),
    (keys("model_index.json", unet=["diffusers", "UNet3DConditionModel"]), "its unet is a UNet3DConditionModel"),
    (
        keys("model_index.json", unet=[None, None], transformer=["diffusers", "SD3Transformer2DModel"]),
        "a SD3Transformer2DModel",
    ),
    (keys("model_index.json", unet=[None, None]), "it has no UNet"),
    (
        keys("model_index.json", text_encoder=[None, None], text_encoder_2=["transformers", "CLIPTextModel"]),
        "a second text encoder but no SDXL UNet",
    ),
    (written("model_index.json", "{"), "model_index.json: is no valid JSON"),
    (written("model_index.json", "[]"), "model_index.json: holds no JSON object"),
    (written("unet/config.json", "{"), "unet/config.json: is no valid JSON"),
    (keys("unet/config.json", block_out_channels=[8], layers_per_block=[1]), "has 1 entries for 4 down_block_types"),
    (keys("unet/config.json", layers_per_block="two"), "unet/config.json: layers_per_block: should be a valid"),
    (cut, "unet/diffusion_pytorch_model.safetensors: is cut short ("),
    (pickled, "unet: has its weights in diffusion_pytorch_model.bin, a pickle, which is never opened"),
    (gone("unet/diffusion_pytorch_model.safetensors"), "unet: has no weights"),
    (varied, "has its weights as the variant 'fp16' only; in Python load the model with variant='fp16'"),
    (a_shard_less, "unet: 1 of 7 weight files are missing, e.g. ['diffusion_pytorch_model-00001-of-00007.safetensors']"),
    (written("unet/diffusion_pytorch_model.safetensors", "version https://git-lfs.github.com/spec/v1\n"), "git-lfs pointer"),
    (replaced_unet(in_channels=9), "takes 9 channels where the latents have 4: a model for inpainting"),
    (replaced_unet(in_channels=8), "a model that follows instructions"),
    (replaced_unet(in_channels=6), "a model for another task"),
    (flowing, "scheduler: FlowMatchEulerDiscreteScheduler has no betas (flow matching or the like)"),
    (keys(SCHEDULER, prediction_type="sample"), "prediction_type is sample; epsilon and v_prediction are served"),
    (keys(SCHEDULER, rescale_betas_zero_snr=True, timestep_spacing="trailing"), "zero terminal SNR with epsilon prediction"),
]


@pytest.mark.parametrize(("breaking", "says"), BROKEN)
def test_what_is_refused_cannot_be_opened(folder: Path, breaking: Callable[[Path], Any], says: str) -> None:
    """And the other way round: what opens is not refused, which the other tests hold."""
    breaking(folder)
    report = examine_model(folder)
    assert not report.usable
    assert any(says in problem for problem in report.problems), report.problems
    assert all(len(problem.splitlines()) == 1 for problem in report.problems)
    with pytest.raises(EasyInvError):
        opened(folder)


@pytest.mark.parametrize(
    "change_it",
    [
        sharded,
        keys(SCHEDULER, rescale_betas_zero_snr=True),
        keys(SCHEDULER, beta_start=None),
        replaced_unet(time_cond_proj_dim=16),
        lambda folder: shutil.copy(
            folder / "unet" / "diffusion_pytorch_model.safetensors",
            folder / "unet" / "diffusion_pytorch_model.fp16.safetensors",
        ),
    ],
)
def test_what_is_not_refused_opens(folder: Path, change_it: Callable[[Path], Any]) -> None:
    change_it(folder)
    assert examine_model(folder).problems == ()
    opened(folder)


def test_schedulers_with_betas_are_known_by_name() -> None:
    """Every scheduler of diffusers whose parameters can be seen."""
    names = [name for name in dir(schedulers) if name.endswith("Scheduler")]
    known = {name: inspect.signature(getattr(schedulers, name).__init__).parameters for name in names}
    seen = {name: "beta_start" in given for name, given in known.items() if "num_train_timesteps" in given}
    assert len(seen) > 20
    assert {name: name.startswith(WITH_BETAS) for name in seen} == seen


@pytest.mark.parametrize("changes", [{"class_embed_type": "timestep"}, {"num_class_embeds": 3}])
def test_a_unet_with_classes_is_refused(folder: Path, changes: dict[str, Any]) -> None:
    replaced_unet(**changes)(folder)
    assert "its UNet needs a class or a picture beside the text" in examine_model(folder).problems[0]


def test_a_unet_told_its_guidance_is_noted(folder: Path) -> None:
    replaced_unet(time_cond_proj_dim=16)(folder)
    report = examine_model(folder)
    assert report.guidance_embedded
    assert "was distilled with its guidance scale as an input" in report.notes[0]


def test_a_size_that_is_not_told_is_noted(folder: Path) -> None:
    change(folder / "unet" / "config.json", sample_size=None)
    report = examine_model(folder)
    assert report.native_size is None
    assert "give size to every edit" in report.notes[0]


def test_the_refiner_is_told_from_the_base(saved: Mapping[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved["sdxl"], tmp_path / "refiner"))
    change(folder / "model_index.json", text_encoder=[None, None], tokenizer=[None, None])
    report = examine_model(folder)
    assert report.family is None
    assert report.problems == ("it is SDXL's refiner (no first text encoder), which is not served; take the base model",)


def test_several_problems_are_told_at_once(folder: Path) -> None:
    part_taken("vae")(folder)
    keys(SCHEDULER, prediction_type="sample")(folder)
    pickled(folder)
    assert len(examine_model(folder).problems) == 3


def published(folder: Path, like: Path, width: int, size: int, **scheduler: Any) -> Path:
    """The JSON files of a published model; its weights are left away. like: a folder with the same parts."""
    changes, _ = PUBLISHED[width]
    texts = {"unet": {"sample_size": size // 8, "cross_attention_dim": width, **changes}}
    texts["vae"] = {"latent_channels": 4, "block_out_channels": [128, 256, 512, 512]}
    for name, content in texts.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(content))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({**models.BETAS, **scheduler}))
    shutil.copy(like / "model_index.json", folder)
    return folder


@pytest.mark.parametrize(
    ("width", "size", "scheduler", "names"),
    [
        (768, 512, {}, ["sd14", "sd15", "lcm-sd15"]),
        (1024, 512, {}, ["sd21-base", "sd-turbo"]),
        (1024, 512, {"timestep_spacing": "trailing"}, ["sd-turbo", "sd21-base"]),
        (1024, 768, {"prediction_type": "v_prediction"}, ["sd21"]),
        (2048, 1024, {"timestep_spacing": "leading"}, ["sdxl", "sdxl-lightning"]),
        (2048, 512, {"timestep_spacing": "trailing"}, ["sdxl-turbo"]),
        (768, 512, {"prediction_type": "v_prediction"}, []),
        (768, 768, {}, []),
    ],
)
def test_presets_that_fit(
    saved: Mapping[str, Path], tmp_path: Path, width: int, size: int, scheduler: dict[str, Any], names: list[str]
) -> None:
    like = saved["sdxl" if width == 2048 else "sd"]
    report = examine_model(published(tmp_path / "m", like, width, size, **scheduler))
    assert list(report.presets) == names
    assert report.native_size == (size, size)
    assert report.self_attention_sites == (70 if width == 2048 else 16)
    assert all(presets()[name].family == report.family for name in names)


def test_the_embedded_model_fits_its_preset(embedded: EditPipeline) -> None:
    report = examine("embedded")
    assert (report.usable, report.presets) == (True, ("embedded",))
    assert report.native_size == embedded.backbone.native_size
    assert report.parts["unet"].dtype == "float16"


def lora(folder: Path) -> None:
    save_file({"unet.x.lora_A.weight": torch.zeros(2)}, folder / "pytorch_lora_weights.safetensors")


def checkpoint(*more: str, channels: int = 4) -> Callable[[Path], None]:
    def put(folder: Path) -> None:
        tensors = {name: torch.zeros(1) for name in more}
        first = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, channels, 3, 3)}
        save_file({**first, **tensors}, folder / "x.safetensors")

    return put


def tensors(*names: str) -> Callable[[Path], None]:
    return lambda folder: save_file({name: torch.zeros(1) for name in names}, folder / "x.safetensors")


def snapshot(folder: Path) -> None:
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / "model_index.json").write_text("{}")


STRANGERS: list[tuple[Callable[[Path], Any], str]] = [
    (lora, "is a LoRA, not a model; load its model in diffusers, call pipe.load_lora_weights('{}"),
    (tensors("lora_unet_x.lora_down.weight"), "is a LoRA"),
    (tensors("lokr_w1"), "is a LoRA"),
    (written("adapter_config.json", "{}"), "is a LoRA"),
    (checkpoint(), "StableDiffusionPipeline.from_single_file('{}/x.safetensors').save_pretrained('FOLDER')"),
    (checkpoint("conditioner.embedders.1.model.ln.weight"), "StableDiffusionXLPipeline.from_single_file("),
    (checkpoint("conditioner.embedders.0.model.ln.weight"), "SDXL's refiner"),
    (checkpoint(channels=9), "whose UNet takes 9 channels (inpainting or the like), which is not served"),
    (checkpoint("model.diffusion_model.joint_blocks.0.x"), "is a checkpoint of a transformer"),
    (tensors("double_blocks.0.x"), "is a checkpoint of a transformer"),
    (tensors("control_model.x"), "is a ControlNet"),
    (written("model.ckpt", "x"), "is a single-file checkpoint; make a folder of it once, with diffusers"),
    (written("model.safetensors", "x"), "model.safetensors: is no safetensors file, or damaged"),
    (lambda folder: models.sd_unet().save_pretrained(folder), "is one part of a model (UNet2DConditionModel), not a whole one"),
    (written("config.json", '{"_class_name": "ControlNetModel"}'), "is a ControlNet (ControlNetModel), not a model"),
    (written("config.json", '{"architectures": ["CLIPTextModel"]}'), "is one part of a model (CLIPTextModel)"),
    (written("config.json", "{"), "config.json: is no valid JSON"),
    (snapshot, "is an entry of the hub cache; give {}/snapshots/abc"),
]


@pytest.mark.parametrize(("put", "says"), STRANGERS)
def test_what_is_often_given_for_a_model(tmp_path: Path, put: Callable[[Path], Any], says: str) -> None:
    put(tmp_path)
    report = examine_model(tmp_path)
    assert (report.usable, report.family, len(report.problems)) == (False, None, 1)
    assert says.format(tmp_path) in report.problems[0]


@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt", "x.bin"])
def test_a_file_is_told_like_the_folder_it_lies_in(tmp_path: Path, name: str) -> None:
    checkpoint()(tmp_path)
    (tmp_path / "x.safetensors").rename(tmp_path / name)
    assert examine_model(tmp_path / name).problems == examine_model(tmp_path).problems
    assert f"StableDiffusionPipeline.from_single_file('{tmp_path / name}')" in examine_model(tmp_path / name).problems[0]
    assert ("only one you trust" in examine_model(tmp_path).problems[0]) == (name != "x.safetensors")


def test_a_unet_file_alone(saved: Mapping[str, Path]) -> None:
    problem = examine_model(saved["sd"] / "unet" / "diffusion_pytorch_model.safetensors").problems[0]
    assert problem.startswith("is a UNet alone; load its model in diffusers with unet=...")
    problem = examine_model(saved["sd"] / "unet").problems[0]
    assert problem == f"is one part of a model (UNet2DConditionModel); give {saved['sd']}"


@pytest.mark.parametrize(
    "put", [lambda folder: None, written("notes.txt", "x"), tensors("weight"), written("model_index.yaml", "{}")]
)
def test_what_is_nothing_like_a_model(tmp_path: Path, put: Callable[[Path], Any]) -> None:
    put(tmp_path)
    for path in (tmp_path, *tmp_path.iterdir()):
        with pytest.raises(ModelError, match="is no model") as caught:
            examine_model(path)
        assert len(str(caught.value).splitlines()) == 1


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match="there is no such folder; give a model folder, or a name from `easyinv-edit models list`"
    ):
        examine_model(tmp_path / "none")


def test_a_file_cut_anywhere_is_told(saved: Mapping[str, Path], tmp_path: Path) -> None:
    whole = (saved["sd"] / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    file = tmp_path / "x.safetensors"
    for length in [*range(20), len(whole) // 2, len(whole) - 1]:
        file.write_bytes(whole[:length])
        with pytest.raises(Unreadable, match=r"cut short|no safetensors file"):
            read_header(file)
    file.write_bytes(whole)
    assert len(read_header(file)) == len(models.autoencoder().state_dict())


@pytest.mark.parametrize(
    "header",
    ["[]", "1", '{"a": 1}', '{"a": {}}', '{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 0]}}', "{", "\u00e9"],
)
def test_a_header_of_any_kind_is_no_traceback(tmp_path: Path, header: str) -> None:
    text = header.encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(Unreadable):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "vae/config.json", SCHEDULER])
def test_settings_of_any_type_are_no_traceback(folder: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("easyinv_edit.model_check.presets", dict)  # read anew each time
    content = json.loads((folder / file).read_text())
    for key in content.keys() & READ:
        for value in (None, "x", -1, [], [None], {}, [[[]]], True, 1e300):
            (folder / file).write_text(json.dumps({**content, key: value}))
            assert isinstance(examine_model(folder), ModelReport)


READ = FIELDS | set(VAEConfig.__dataclass_fields__) | set(SchedulerConfig.__dataclass_fields__) | {"_class_name", "unet", "vae"}


def cached(cache: Path, hub_name: str, model: Path) -> None:
    """Put a model into a hub cache."""
    entry = cache / f"models--{hub_name.replace('/', '--')}"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "main").write_text("0" * 40)
    (entry / "snapshots").mkdir()
    (entry / "snapshots" / ("0" * 40)).symlink_to(model)


def test_a_name_is_looked_up_in_the_hub_cache(
    saved: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    report = examine("sd15")
    hub_name = presets()["sd15"].id
    assert (report.usable, report.family, report.presets) == (False, "sd", ("sd15",))
    assert f"`hf download {hub_name} --local-dir FOLDER`" in report.problems[0]
    with pytest.raises(ModelError, match=r"owner/model: is no folder, no name from .*, and not in the local hub cache"):
        examine("owner/model")
    for name in (hub_name, "owner/model"):
        cached(tmp_path, name, saved["sd"])
    assert examine("sd15").usable
    assert examine("owner/model").usable
    assert examine("lcm-sd15").notes[-1].startswith("this is the model that lcm-sd15 is built on")
    Path("sd15").mkdir()
    with pytest.raises(ModelError, match="sd15: is no model"):
        examine("sd15")


def test_a_report_is_json(saved: Mapping[str, Path]) -> None:
    facts = json.loads(json.dumps(examine_model(saved["sdxl"]).facts()))
    assert (facts["usable"], facts["family"], facts["native_size"]) == (True, "sdxl", [32, 32])
    assert facts["parts"]["unet"].keys() == {"dtype", "parameters", "bytes"}
