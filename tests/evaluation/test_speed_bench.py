"""The speed benchmark: what it counts, what it builds, what it prints. Nothing here depends on how fast the machine is."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from attention_control import MasaCtrl, NoControl, list_sites
from easyinv_edit import cost
from easyinv_edit.errors import InputError
from easyinv_edit.evaluation import shapes
from easyinv_edit.evaluation import speed_bench as bench
from easyinv_edit.evaluation.shapes import RandomModel, Shape
from easyinv_edit.evaluation.speed_bench import matrix_rate
from tests.helpers import Command, make_schedule

CPU = torch.device("cpu")
SD = Shape(
    {
        "sample_size": 16,
        "block_out_channels": (16, 16, 32, 32),
        "attention_head_dim": 2,
        "cross_attention_dim": 12,
        "norm_num_groups": 4,
    },
    sites="10-15",
)
XL = Shape(
    {
        "sample_size": 8,
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (1, 2, 4),
        "transformer_layers_per_block": (1, 1, 2),
        "cross_attention_dim": 20,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 24,
        "norm_num_groups": 4,
    },
    sites="8-16",
    prediction_type="v_prediction",
)
TINY = {"tiny": SD, "tiny-xl": XL}
STEPS = 4
WORKS = ["step, plain", "step, MasaCtrl", "DDIM inversion", "edit, plain", "edit, MasaCtrl"]


def plan(**changes: Any) -> bench.Plan:
    return bench.Plan(**{"shapes": {"tiny": SD}, "steps": STEPS, "dtype": torch.float32, "repeats": 1, **changes})


def model(shape: Shape = SD, dtype: torch.dtype = torch.float64) -> RandomModel:
    return RandomModel(shapes.build(shape, dtype, CPU), shape, shape.native_size, CPU)


def silent(_text: str) -> None:
    pass


@pytest.fixture(autouse=True)
def _small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's matrix rate takes a second to measure; here one product of side 64 will do."""
    monkeypatch.setattr(bench, "matrix_rate", lambda dtype, device: matrix_rate(dtype, device, side=64))


@pytest.fixture
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_every_shape_has_a_row_for_each_work() -> None:
    rows = list(bench.measure(plan(shapes=TINY, edit=True, dtype=torch.bfloat16), silent))
    assert [(row["shape"], row["work"]) for row in rows] == [(name, work) for name in TINY for work in WORKS]
    assert [row["size"] for row in rows] == [128] * 5 + [64] * 5
    assert all(row["finite"] for row in rows)
    assert all(row["seconds"] > 0 and row["peak_gigabytes"] > 0.03 for row in rows)


def test_evaluations_are_those_that_an_edit_needs() -> None:
    """Step: every row. Inversion: T. Plain edit: both halves of each target. MasaCtrl: the source too, from step 0.08 T on."""
    for targets in (1, 3):
        rows = list(bench.measure(plan(edit=True, targets=targets), silent))
        both = 2 * targets
        assert [row["rows"] for row in rows] == [1 + both, 1 + both, 1, 1 + both, 1 + both]
        assert [row["evaluations"] for row in rows] == [1 + both, 1 + both, STEPS, both * STEPS, both * STEPS + STEPS - 1]


def test_without_edits_only_steps_are_measured() -> None:
    assert [row["work"] for row in bench.measure(plan(), silent)] == WORKS[:2]


def test_rates_are_quotients() -> None:
    """Six evaluations of 5 GFLOP in 2 seconds are 15 GFLOP/s, three tenths of a product that runs at 50."""
    assert bench.rates(6, 2.0, 5 * 10**9, 50e9) == pytest.approx(
        {"evaluations_per_second": 3.0, "tflop_per_second": 0.015, "fraction": 0.3}
    )


def test_a_row_holds_the_rates_of_its_own_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "matrix_rate", lambda _dtype, _device: (7, 123e9))
    rows = list(bench.measure(plan(size=64), silent))
    flops = shapes.evaluation_flops(SD, 64)
    for row in rows:
        assert (row["matrix_side"], row["matrix_tflop_per_second"], row["tflop_per_evaluation"]) == (7, 0.123, flops / 1e12)
        assert row["fraction"] == pytest.approx(3 * flops / row["seconds"] / 123e9)
        assert row["tflop_per_second"] == pytest.approx(0.123 * row["fraction"])
    assert rows[0]["relative_seconds"] == 1
    assert rows[1]["relative_seconds"] == pytest.approx(rows[1]["seconds"] / rows[0]["seconds"])


def test_the_median_of_a_steps_repeats_is_told_and_the_first_call_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    plain, routed = iter([9.0, 1.0, 5.0, 2.0]), iter([9.0, 4.0, 3.0, 8.0])

    def step(_model: object, _denoiser: object, z: Tensor, control: Any) -> tuple[Tensor, cost.Cost]:
        calls.append(control.name)
        return z, cost.Cost(3, 1, next(plain if control.name == "none" else routed), 1)

    monkeypatch.setattr(bench, "_step", step)
    rows = list(bench.measure(plan(repeats=3), silent))
    assert [row["seconds"] for row in rows] == [2.0, 4.0]
    assert rows[1]["relative_seconds"] == 2.0
    assert calls == ["none", "masactrl"] * 4, "plain and controlled steps take turns"


def test_the_matrix_rate_is_that_of_the_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of 0.5, 0.25 and 1 second; the clock is asked when it begins, around each, and before the third and fourth."""
    ticks = iter([0.0, 0.0, 0.5, 0.5, 0.75, 0.75, 1.0, 2.0, 2.0])
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert matrix_rate(torch.float32, CPU, 10) == (10, 2 * 10**3 / 0.25)
    assert list(ticks) == []


def operations_by_hooks(net: RandomModel) -> int:
    """2 x multiplications of every layer of a real forward pass of one row, and of its attention, counted from its tensors."""
    total = 0

    def layer(module: Any, _args: Any, out: Tensor) -> None:
        nonlocal total
        total += 2 * out.numel() * module.weight[0].numel()

    def attention(module: Any, args: Any, kwargs: Any, _out: Tensor) -> None:
        nonlocal total
        text = kwargs.get("encoder_hidden_states")
        keys = (args[0] if text is None else text).shape[1]
        total += 4 * args[0].shape[1] * keys * module.to_q.out_features

    for module in net.network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_hook(layer)
    for site in (*list_sites(net.network), *list_sites(net.network, "cross")):
        site.module.register_forward_hook(attention, with_kwargs=True)
    net.predict(net.latents(), 1, net.conditioning(1))
    return total


@pytest.mark.parametrize("shape", TINY.values(), ids=TINY)
def test_operations_are_those_of_every_layer_and_attention(no_gradients: None, shape: Shape) -> None:
    assert shapes.evaluation_flops(shape, shape.native_size) == operations_by_hooks(model(shape))


def test_operations_of_a_larger_picture_are_more_than_in_proportion() -> None:
    small, large = (shapes.evaluation_flops(SD, size) for size in (128, 256))
    assert large > 4 * small


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_drawn_in_their_dtype_with_finite_outputs(no_gradients: None, dtype: torch.dtype) -> None:
    made = model(dtype=dtype)
    assert not made.network.training
    for name, parameter in made.network.named_parameters():
        assert (parameter.dtype, parameter.device, parameter.requires_grad) == (dtype, CPU, False)
        if parameter.ndim == 1:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name
        else:
            bound = parameter[0].numel() ** -0.5
            assert 0.3 * bound < parameter.float().std() < 0.8 * bound, name
            assert parameter.abs().max() <= bound * 1.01, name
    out = made.predict(made.latents(), 481, made.conditioning(1))
    assert out.dtype == torch.float32
    assert torch.isfinite(out).all()
    assert out.std() > 0.01


def test_weights_come_from_the_seed() -> None:
    first, again, other = (shapes.build(SD, torch.float32, CPU, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv_in.weight"], other["conv_in.weight"])


class LargeTensors(TorchDispatchMode):
    """Notes the dtypes of all real tensors of more than a thousand numbers that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.device.type != "meta" and out.numel() > 1000:
            self.dtypes.add(out.dtype)
        return out


def test_no_weight_is_ever_made_in_float32_on_the_way_to_half() -> None:
    with LargeTensors() as seen:
        shapes.build(SD, torch.bfloat16, CPU)
    assert seen.dtypes == {torch.bfloat16}


def test_convolutions_are_laid_out_channels_last() -> None:
    made = shapes.build(SD, torch.float32, CPU)
    weight = made.down_blocks[0].resnets[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()


def test_a_model_on_meta_holds_nothing() -> None:
    assert {p.device.type for p in shapes.on_meta(SD).parameters()} == {"meta"}
    assert shapes.parameters(SD) == sum(p.numel() for p in shapes.build(SD, torch.float32, CPU).parameters())


def test_xl_is_given_its_pooled_text_and_sizes(no_gradients: None) -> None:
    made = model(XL)
    given = made.conditioning(2)
    assert given.pooled is not None
    assert given.pooled.shape == (2, 24)
    assert given.time_ids is not None
    assert given.time_ids.tolist() == [[64, 64, 0, 0, 64, 64]] * 2
    z = made.latents().repeat(2, 1, 1, 1).double()
    added = {"text_embeds": given.pooled.double(), "time_ids": given.time_ids}
    direct = made.network(z, 7, encoder_hidden_states=given.embeddings.double(), added_cond_kwargs=added).sample
    assert torch.equal(made.predict(z, 7, given), direct)
    assert model(SD).conditioning(2).pooled is None


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 20, 50, 999])
def test_the_schedule_is_stable_diffusions(steps: int, kind: str) -> None:
    assert bench.shapes.noise_schedule(steps, kind) == make_schedule(steps, kind)


@pytest.mark.parametrize("shape", TINY.values(), ids=TINY)
def test_a_controlled_step_changes_targets_and_leaves_the_source(no_gradients: None, shape: Shape) -> None:
    made = model(shape)
    denoiser, z = made.denoiser(STEPS, 1, bench.GUIDANCE), made.latents().repeat(2, 1, 1, 1).double()
    plain, _ = bench._step(made, denoiser, z, NoControl())
    routed, _ = bench._step(made, denoiser, z, MasaCtrl(start_step=0, sites=shape.sites))
    assert torch.allclose(plain[0], routed[0], atol=1e-12)
    assert (plain[1] - routed[1]).abs().max() > 1e-4
    assert torch.equal(plain, denoiser(z, STEPS))


def test_nothing_is_left_on_the_unet(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = shapes.build(SD, torch.float32, CPU)
    monkeypatch.setattr(shapes, "build", lambda *_: unet)
    assert len(list(bench.measure(plan(edit=True), silent))) == len(WORKS)
    assert {type(processor) for processor in unet.attn_processors.values()} == {AttnProcessor2_0}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())


def test_a_result_that_is_not_finite_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    build, told = shapes.build, list[str]()

    def overflowing(*arguments: Any) -> Any:
        unet = build(*arguments)
        unet.conv_out.bias.fill_(float("inf"))
        return unet

    monkeypatch.setattr(shapes, "build", overflowing)
    rows = list(bench.measure(plan(), told.append))
    assert [row["finite"] for row in rows] == [False, False]
    assert [text for text in told if "not finite" in text] == [f"tiny: {work}: the result is not finite" for work in WORKS[:2]]


def test_memory_is_weights_and_rows_in_the_dtype() -> None:
    weights = shapes.parameters(SD)
    full, half = (shapes.needed_bytes(SD, 128, 3, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert full == 2 * half
    assert half == 2 * (weights + 3 * 64 * 16 * 16**2)
    published = shapes.SHAPES["sdxl"]
    assert 5.1e9 < shapes.needed_bytes(published, 1024, 3, torch.bfloat16) < 8e9


def test_nothing_is_built_where_memory_will_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "build", lambda *_: pytest.fail("was built"))
    monkeypatch.setattr(bench, "free_bytes", lambda _device: 100_000)
    with pytest.raises(InputError, match=r"tiny needs about 0\.0 GB at this size and dtype, and cpu has 0\.0 GB free"):
        next(bench.measure(plan(), silent))
    monkeypatch.setattr(bench, "free_bytes", lambda _device: None)
    bench.require_memory(plan(), "tiny", SD)


def test_the_environment_names_the_machine() -> None:
    found = bench.environment(plan(dtype=torch.bfloat16))
    assert (found["device"], found["gpu"], found["dtype"]) == ("cpu", None, "bfloat16")
    assert found["cpu"]
    assert found["threads"] == torch.get_num_threads()
    assert found["versions"]["torch"] == torch.__version__
    assert "process" in found["memory"]


@pytest.fixture
def tiny_published(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "SHAPES", TINY)


ARGUMENTS = ("bench", "speed", "--shapes", "tiny", "--device", "cpu", "--dtype", "float32", "--repeats", "1", "--steps", "4")


def test_the_command_writes_its_tables(command: Command, tmp_path: Path, tiny_published: None) -> None:
    code, out, err = command(*ARGUMENTS, "--edit", "-o", str(tmp_path / "run"))
    assert code == 0
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["speed.csv", "speed.json", "speed.md"]
    content = json.loads((tmp_path / "run" / "speed.json").read_text())
    assert [row["work"] for row in content["rows"]] == WORKS
    assert content["request"]["shapes"] == ["tiny"]
    assert content["environment"] == bench.environment(plan())
    read = list(csv.DictReader((tmp_path / "run" / "speed.csv").read_text().splitlines()))
    assert [float(row["seconds"]) for row in read] == [row["seconds"] for row in content["rows"]]
    assert (tmp_path / "run" / "speed.md").read_text() == out
    assert "| tiny | 128 | edit, MasaCtrl | 3 | 11 |" in out
    assert f"torch {torch.__version__}, float32" in out
    assert "TFLOP an evaluation" in err


def test_the_command_prints_json(command: Command, tmp_path: Path, tiny_published: None) -> None:
    code, out, err = command(*ARGUMENTS, "--json", "--size", "64", "--targets", "2", "-o", str(tmp_path / "run"))
    assert (code, err) == (0, "")
    assert [(row["size"], row["evaluations"]) for row in json.loads(out)] == [(64, 5), (64, 5)]


def test_a_stopped_run_keeps_what_was_measured(
    command: Command, tmp_path: Path, tiny_published: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = bench.measure

    def stopped(*arguments: Any) -> Iterator[dict[str, Any]]:
        yield next(measure(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "measure", stopped)
    code, _, err = command(*ARGUMENTS, "-o", str(tmp_path / "run"))
    assert code == 130
    assert f"the lines that were measured are in {tmp_path / 'run'}" in err
    assert [row["work"] for row in json.loads((tmp_path / "run" / "speed.json").read_text())["rows"]] == WORKS[:1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--shapes", "sd14,sd3"], "'sd3' is unknown"),
        (["--shapes", "sd3"], "choose from sd14, sd21, sdxl"),
        (["--size", "100"], "--size 100: give a multiple of 64, or 0"),
        (["--dtype", "float8"], "--dtype 'float8': choose float32, bfloat16 or float16"),
        (["--device", "abacus"], "device 'abacus' cannot be used here"),
    ],
)
def test_the_command_refuses_in_one_line(command: Command, tmp_path: Path, arguments: list[str], says: str) -> None:
    code, _, err = command("bench", "speed", "-o", str(tmp_path / "run"), *arguments)
    assert code == 2
    assert err.count("\n") == 1
    assert says in err
    assert not (tmp_path / "run").exists()


def test_the_command_refuses_what_memory_cannot_hold(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "free_bytes", lambda _device: 4 * 10**9)
    code, _, err = command("bench", "speed", "--device", "cpu", "-o", str(tmp_path / "run"))
    assert code == 2
    assert err.count("\n") == 1
    assert "sdxl needs about 7.1 GB at this size and dtype, and cpu has 4.0 GB free; choose a smaller shape" in err
    assert not (tmp_path / "run").exists()
