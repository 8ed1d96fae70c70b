"""Methods by name, by mapping or as objects."""

from __future__ import annotations

from typing import Any

import pytest

from attention_control import CONTROLLERS, MasaCtrl
from easyinv_edit.choices import build, describe, nearest, shown
from easyinv_edit.errors import InputError
from easyinv_edit.inversion import DDIM, INVERSIONS, EasyInv


def refusal(choice: Any, registry: Any = INVERSIONS, what: str = "inversion method") -> str:
    """The error of a choice; one line that starts with what it was for."""
    with pytest.raises(InputError) as caught:
        build(registry, choice, what)
    message = str(caught.value)
    assert message.startswith(what)
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("registry", [INVERSIONS, CONTROLLERS])
def test_every_registered_method_builds_by_name(registry: Any) -> None:
    for name, method in registry.items():
        needed = getattr(method, "example", {})
        built = build(registry, {"name": name, **needed}, "method")
        assert type(built) is method
        assert built == method(**needed)
        assert needed or built == build(registry, name, "method")


def test_a_mapping_sets_fields() -> None:
    built = build(INVERSIONS, {"name": "easyinv", "eta": 0.7, "window": [0.1, 0.2]}, "method")
    assert built == EasyInv(eta=0.7, window=(0.1, 0.2))


def test_an_object_is_returned_as_it_is() -> None:
    method = DDIM()
    assert build(INVERSIONS, method, "method") is method


def test_an_unknown_name_lists_the_names() -> None:
    message = refusal("easyinf")
    assert message == f"inversion method 'easyinf' is unknown; choose {', '.join(INVERSIONS)} - did you mean 'easyinv'?"
    assert "did you mean" not in refusal("qqq")


@pytest.mark.parametrize("choice", [{"eta": 0.3}, {"name": None}, {"name": ["ddim"]}, {"name": 3}, ""])
def test_a_name_that_is_none_is_refused(choice: Any) -> None:
    assert "is unknown; choose easyinv" in refusal(choice)


def test_an_unknown_field_lists_the_fields() -> None:
    message = refusal({"name": "masactrl", "strengh": 1}, CONTROLLERS, "controller")
    assert message.startswith(
        "controller masactrl: strengh: unknown setting of masactrl; allowed: start_step, stop_step, sites"
    )
    assert message.endswith("did you mean 'strength'?")
    assert "allowed: none" in refusal({"name": "ddim", "eta": 1})
    assert "unknown setting" in refusal({"name": "ddim", 3: 1})


def test_every_wrong_field_is_named_at_once() -> None:
    message = refusal({"name": "easyinv", "eta": 2, "variant": "x", "windo": 1})
    assert "eta: should be less than or equal to 1 (got 2)" in message
    assert "variant: should be 'repo' or 'paper' (got 'x')" in message
    assert "windo: unknown setting" in message


def test_a_long_value_is_cut() -> None:
    assert len(refusal({"name": "easyinv", "eta": "y" * 1000})) < 250
    assert shown("a\nb") == r"'a\nb'"


def test_nearest_says_nothing_when_nothing_is_near() -> None:
    assert nearest("qqq", INVERSIONS) == ""
    assert nearest(None, INVERSIONS) == ""


def test_describe_is_what_build_takes() -> None:
    method = MasaCtrl(strength=0.5, sites="3")
    assert describe(method).items() >= {"name": "masactrl", "start_step": 0.08, "sites": "3", "strength": 0.5}.items()
    assert build(CONTROLLERS, describe(method), "controller") == method


def test_describe_names_a_method_that_is_no_dataclass() -> None:
    class Mine:
        pass

    assert describe(Mine()) == {"name": "Mine"}
