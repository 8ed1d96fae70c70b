"""What stands in for a prompt's words: textual inversions, and embeddings the user made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_control import ControlError, Words
from easyinv_edit.conditioning import Conditioning
from easyinv_edit.errors import EasyInvWarning, InputError
from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.rows import words_of
from easyinv_edit.tabletop.networks import build_tokenizer
from easyinv_edit.trajectory import Trajectory
from tests import models
from tests.adapters import MASACTRL, OTHER, SOURCE, TARGET, photo, wrapped

T = 2
FAMILIES = pytest.mark.parametrize("family", ["sd", "sdxl"])
NEGATIVE = "a dark ring"


def learned(count: int, width: int = models.WIDTH, seed: int = 0) -> Tensor:
    """The embeddings (count, width) of a textual inversion."""
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def with_concepts(family: str = "sd", **concepts: int) -> EditPipeline:
    """A pipeline with textual inversions: name -> how many vectors, loaded by diffusers itself."""
    inner = models.FAMILIES[family]()
    for seed, (name, count) in enumerate(concepts.items()):
        for number in ("", "_2") if family == "sdxl" else ("",):
            own = {part: getattr(inner, part + number) for part in ("tokenizer", "text_encoder")}
            if number and inner.tokenizer_2 is inner.tokenizer:
                own["tokenizer"] = inner.tokenizer_2 = build_tokenizer()
            inner.load_textual_inversion(learned(count, seed=seed), token=name, **own)
    return wrapped(inner)


def words(pipe: EditPipeline, prompt: str) -> Words:
    """The prompt's words and their places."""
    return words_of(pipe.backbone, [prompt])[0]


def inverted(pipe: EditPipeline, prompt: Any = SOURCE, **options: Any) -> Trajectory:
    """The picture, inverted."""
    return pipe.invert(photo(), prompt, "ddim", num_inference_steps=T, **options)


def edited(pipe: EditPipeline, trajectory: Trajectory, prompt: Any = TARGET, control: Any = MASACTRL, **options: Any) -> Tensor:
    """The targets' latents."""
    return pipe.edit(trajectory, prompt, control=control, output_type="latent", **options).images


# Textual inversions


@FAMILIES
@pytest.mark.parametrize("prompt", ["a <cat>", "<cat> and <style>, red", "a ball in <style>"])
def test_a_learned_word_is_embedded_as_the_pipeline_does(family: str, prompt: str) -> None:
    pipe = with_concepts(family, **{"<cat>": 1, "<style>": 3})
    device = torch.device("cpu")
    expected = pipe.backbone.pipe.encode_prompt(
        prompt, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    ours = pipe.backbone.embed([prompt])
    assert torch.equal(ours.embeddings, expected[0])
    assert ours.pooled is None or torch.equal(ours.pooled, expected[2])
    assert not torch.equal(ours.embeddings, wrapped(models.FAMILIES[family]()).backbone.embed([prompt]).embeddings)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a <cat-toy>", [("a", (1,)), ("<cat-toy>", (2,))]),
        ("a <style> ball", [("a", (1,)), ("<style>", (2, 3, 4)), ("ball", (5,))]),
        ("<style>", [("<style>", (1, 2, 3))]),
        ("sks, <style>.", [("sks", (1, 2)), (",", (3,)), ("<style>", (4, 5, 6)), (".", (7,))]),
        ("a<style>ball", [("a", (1,)), ("<style>", (2, 3, 4)), ("ball", (5,))]),
        ("sks sks", [("sks", (1, 2)), ("sks", (3, 4))]),
        ("a red ball", [("a", (1,)), ("red", (2,)), ("ball", (3,))]),
        ("< red >", [("<", (1,)), ("red", (2,)), (">", (3,))]),
    ],
)
def test_a_learned_word_is_one_word_with_all_its_vectors(prompt: str, expected: list[tuple[str, tuple[int, ...]]]) -> None:
    pipe = with_concepts(**{"<cat-toy>": 1, "<style>": 3, "sks": 2})
    assert pipe.backbone.words(prompt) == (expected, pipe.backbone.pipe.tokenizer.model_max_length)


@FAMILIES
def test_the_places_of_a_learned_word_are_where_its_vectors_go_in(family: str) -> None:
    """Checked in the text encoder: its input embeddings at these places are the learned ones, and nowhere else."""
    pipe = with_concepts(family, **{"<style>": 3})
    inner, prompt = pipe.backbone.pipe, "a red <style> ball"
    ids = inner.tokenizer(
        inner.maybe_convert_prompt(prompt, inner.tokenizer), padding="max_length", return_tensors="pt"
    ).input_ids
    given = inner.text_encoder.get_input_embeddings()(ids)[0]
    places = [i for i, vector in enumerate(given) if any(torch.equal(vector, own) for own in learned(3))]
    assert words(pipe, prompt).find("<style>") == places == [3, 4, 5]


@pytest.mark.parametrize("phrase", ["<style>", "style", "STYLE", "<style> ball", "red <style>"])
def test_a_learned_word_is_found_by_its_name_or_its_letters(phrase: str) -> None:
    found = words(with_concepts(**{"<style>": 2}), "a red <style> ball").find(phrase)
    assert found == [2] * ("red" in phrase) + [3, 4] + [5] * ("ball" in phrase)


def test_a_learned_word_that_only_half_fits_is_dropped_whole() -> None:
    pipe = with_concepts(**{"<style>": 3})
    room = pipe.backbone.pipe.tokenizer.model_max_length - 2
    fits, over = " ".join(["red"] * (room - 3)), " ".join(["red"] * (room - 2))
    assert words(pipe, f"{fits} <style>").find("<style>") == [room - 2, room - 1, room]
    with pytest.warns(EasyInvWarning, match=f"has {room + 1} tokens and the model reads {room}; .* dropped: '<style>'"):
        cut = pipe.backbone.embed([f"{over} <style>"])
    assert torch.equal(cut.embeddings, pipe.backbone.embed([over]).embeddings)
    assert words(pipe, f"{over} <style>").tokens[-1] == ()


@pytest.mark.parametrize("count", [1, 3])
def test_prompt_to_prompt_weighs_a_learned_word_as_a_whole(count: int) -> None:
    """The maps of all its vectors are weighed: the same as naming every vector's place, and not the same as one alone."""
    pipe = with_concepts(**{"<style>": count})
    source = inverted(pipe, "a red ball")
    control = {"name": "prompt_to_prompt", "cross_steps": 1.0, "self_steps": 0}
    prompt = "a red <style> ball"
    plain = edited(pipe, source, prompt, control)
    weighed = edited(pipe, source, prompt, {**control, "reweight": {"<style>": 4.0}})
    assert (weighed - plain).abs().max() > 1e-3
    alone = weighed_at(pipe, source, prompt, control, [3])
    every = weighed_at(pipe, source, prompt, control, [3 + i for i in range(count)])
    assert torch.equal(weighed, every)
    assert torch.equal(weighed, alone) is (count == 1)


def weighed_at(pipe: EditPipeline, source: Trajectory, prompt: str, control: dict[str, Any], places: list[int]) -> Tensor:
    """The edit where the word named "<style>" stands at these places and no other."""
    backbone, found = pipe.backbone, pipe.backbone.words

    def moved(text: Any) -> Any:
        pairs, length = found(text)
        return [(word, tuple(places) if word == "<style>" else at) for word, at in pairs], length

    backbone.words = moved
    try:
        return edited(pipe, source, prompt, {**control, "reweight": {"<style>": 4.0}})
    finally:
        del backbone.words


@FAMILIES
def test_masactrl_masks_by_a_learned_word(family: str) -> None:
    pipe = with_concepts(family, **{"<style>": 2})
    source = inverted(pipe, "a <style>")
    control = {**MASACTRL, "source_words": "<style>", "target_words": "<style>"}
    masked = edited(pipe, source, "a blue <style>", control)
    assert torch.isfinite(masked).all()
    assert (masked - edited(pipe, source, "a blue <style>")).abs().max() > 1e-4


# Embeddings in a prompt's place


def made(pipe: EditPipeline, *prompts: str) -> list[Conditioning]:
    """Embeddings as the model's own encode_prompt makes them, a row each."""
    out = pipe.backbone.pipe.encode_prompt(
        list(prompts), device=torch.device("cpu"), num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    pooled = out[2] if len(out) == 4 else None
    rows = range(len(prompts))
    return [Conditioning(out[0][r : r + 1], None if pooled is None else pooled[r : r + 1]) for r in rows]


@FAMILIES
def test_embeddings_edit_as_their_text_does(family: str) -> None:
    """Bit for bit where they were encoded in the same batch; rounding else."""
    pipe = wrapped(models.FAMILIES[family]())
    source = inverted(pipe)
    text = edited(pipe, source, TARGET, negative_prompt=NEGATIVE)
    own, target, negative = made(pipe, SOURCE, TARGET, NEGATIVE)
    kept = replace(source, given=own.parts())
    assert torch.equal(edited(pipe, kept, target, negative_prompt=negative), text)
    for prompt, against in ((made(pipe, TARGET)[0], NEGATIVE), (TARGET, made(pipe, NEGATIVE)[0])):
        assert (edited(pipe, source, prompt, negative_prompt=against) - text).abs().max() <= 1e-4
    assert (edited(pipe, source, made(pipe, OTHER)[0], negative_prompt=NEGATIVE) - text).abs().max() > 1e-3


@FAMILIES
def test_embeddings_may_stand_for_the_sources_prompt(family: str, tmp_path: Path) -> None:
    pipe = wrapped(models.FAMILIES[family]())
    by_text = inverted(pipe, SOURCE)
    given = made(pipe, SOURCE)[0]
    by_embeddings = inverted(pipe, given)
    assert (by_embeddings.latents - by_text.latents).abs().max() <= 1e-4
    assert by_embeddings.prompt == ""
    by_embeddings.save(tmp_path / "source.safetensors")
    loaded = Trajectory.load(tmp_path / "source.safetensors")
    assert loaded.given.keys() == given.parts().keys()
    assert all(torch.equal(loaded.given[name], part) for name, part in given.parts().items())
    expected = edited(pipe, by_text)
    assert (edited(pipe, loaded) - expected).abs().max() <= 1e-3
    assert torch.equal(edited(pipe, loaded), edited(pipe, by_embeddings))
    without = replace(loaded, given={})
    assert (edited(pipe, without) - expected).abs().max() > 1e-3
    assert (pipe.reconstruct(loaded)[0] - pipe.reconstruct(by_text)[0]).abs().max() <= 1e-4


@FAMILIES
def test_texts_and_embeddings_go_together(family: str) -> None:
    pipe = wrapped(models.FAMILIES[family]())
    source = inverted(pipe)
    mixed = pipe.edit(source, [TARGET, made(pipe, OTHER)[0]], control=MASACTRL, output_type="latent")
    assert (mixed.images - edited(pipe, source, [TARGET, OTHER])).abs().max() <= 1e-4
    assert mixed.prompts == mixed.recipe["prompts"] == [TARGET, "(embeddings)"]
    result = pipe.edit(source, TARGET, control="none", negative_prompt=made(pipe, NEGATIVE)[0], output_type="latent")
    assert result.recipe["negative_prompt"] == "(embeddings)"


def test_embeddings_of_a_half_precision_pipeline_are_brought_to_the_latents_dtype() -> None:
    pipe = wrapped(models.sd().to(torch.bfloat16))
    source, given = inverted(pipe), made(pipe, TARGET)[0]
    assert given.embeddings.dtype == torch.bfloat16
    assert pipe.backbone.embed([given]).embeddings.dtype == torch.float32
    assert torch.equal(edited(pipe, source, given), edited(pipe, source))


@FAMILIES
def test_what_else_a_conditioning_holds_is_not_taken_from_it(family: str) -> None:
    """Pictures and sizes belong to the edit; a conditioning stands for a prompt alone, also one that `embed` returned."""
    pipe = wrapped(models.FAMILIES[family]())
    source, given = inverted(pipe), made(pipe, TARGET)[0]
    more = given.having({"hint_scales": torch.ones(1, 1), "hints": torch.ones(1, 1, 3, 32, 32), "guidance": torch.ones(1)})
    more = more.having({"time_ids": torch.full((1, 6), 7.0), "image.0": torch.ones(1, 1, 4)})
    assert torch.equal(edited(pipe, source, more), edited(pipe, source, given))
    assert torch.equal(inverted(pipe, more).latents, inverted(pipe, given).latents)
    assert inverted(pipe, more).given.keys() == given.parts().keys()


def test_embeddings_have_no_words() -> None:
    pipe = wrapped(models.sd())
    source = inverted(pipe)
    with pytest.raises(ControlError, match="its words are none") as refusal:
        edited(pipe, source, made(pipe, TARGET)[0], {"name": "prompt_to_prompt", "reweight": {"blue": 2.0}})
    assert len(str(refusal.value).splitlines()) == 1


@FAMILIES
@pytest.mark.parametrize("place", ["source", "target", "negative"])
def test_embeddings_of_another_model_are_refused(family: str, place: str) -> None:
    pipe = wrapped(models.FAMILIES[family]())
    source, good = inverted(pipe), made(pipe, TARGET)[0]
    width = good.embeddings.shape[2]
    wide = Conditioning(torch.cat([good.embeddings] * 2, 2), good.pooled)
    two = Conditioning(torch.cat([good.embeddings] * 2), None if good.pooled is None else torch.cat([good.pooled] * 2))
    flat = Conditioning(good.embeddings[0], good.pooled)
    pooled = Conditioning(good.embeddings, torch.zeros(1, models.WIDTH) if good.pooled is None else None)
    asked = r"this model reads \(1, tokens, " + str(width) + r"\), one Conditioning a prompt"
    use: dict[str, Callable[[Conditioning], Any]] = {
        "source": lambda bad: inverted(pipe, bad),
        "target": lambda bad: edited(pipe, source, bad),
        "negative": lambda bad: edited(pipe, source, negative_prompt=bad),
    }
    superfluous = "also needs pooled embeddings" if family == "sdxl" else "reads no pooled embeddings"
    for bad, says in ((wide, asked), (two, asked), (flat, asked), (pooled, superfluous)):
        with pytest.raises(InputError, match=says) as refusal:
            use[place](bad)
        assert len(str(refusal.value).splitlines()) == 1


@FAMILIES
def test_prompts_of_different_token_counts_are_refused(family: str) -> None:
    pipe = wrapped(models.FAMILIES[family]())
    source, good = inverted(pipe), made(pipe, TARGET)[0]
    short = Conditioning(good.embeddings[:, :-4], good.pooled)
    with pytest.raises(InputError, match=r"prompt embeddings of 20x.* and 24x.* cannot be used together; pad them"):
        edited(pipe, source, short)
    assert torch.isfinite(edited(pipe, inverted(pipe, short, negative_prompt=short), short, negative_prompt=short)).all()
