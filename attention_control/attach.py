"""Putting processors and hooks on a UNet, and taking them off again whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from diffusers.models.attention_processor import FusedAttnProcessor2_0
from torch import Tensor, nn

from attention_control.cross_maps import CrossMaps, map_sites
from attention_control.errors import ControlError
from attention_control.features import FeatureCopy
from attention_control.processor import CrossProcessor, RoutedProcessor
from attention_control.routes import Route
from attention_control.run import Program, Run
from attention_control.sites import ALLOWED, AttentionSite, list_sites, select_sites

if TYPE_CHECKING:
    from attention_control.reference_cache import ReferenceCache
    from attention_control.session import Session

OURS = (RoutedProcessor, CrossProcessor)


@contextmanager
def attached(
    unet: nn.Module, program: Program, run: Run, make: Callable[..., Session], reference: ReferenceCache | None
) -> Iterator[Session]:
    """A session whose processors and hooks are on the UNet inside the block."""
    own, cross = list_sites(unet, "self"), list_sites(unet, "cross")
    chosen = assign(program.routes, own, run)
    routed = [site for site in own if site.path in chosen]
    watched, map_size = map_sites(cross, run.latent_size)
    touched = cross if program.cross else watched if program.wants_maps else []
    _refuse_unusable([*routed, *touched], [*own, *cross])
    session = make(
        program,
        run,
        {site.path: chosen[site.path] for site in routed},
        {site.path: site for site in (*own, *cross)},
        CrossMaps(map_size),
        frozenset(site.path for site in watched if program.wants_maps),
        reference,
        next(unet.parameters()).device if run.device is None else run.device,
    )
    with ExitStack() as stack:
        for feature in {feature.path: feature for feature in program.features}.values():
            stack.callback(_copy_feature(unet, feature, len(own), session).remove)
        for site in routed:
            _replace(stack, site, RoutedProcessor(site.path, site.module.processor, session))
        for site in touched:
            _replace(stack, site, CrossProcessor(site.path, site.module.processor, session))
        yield session


@contextmanager
def watched(unet: nn.Module, paths: Sequence[str], plans: Any) -> Iterator[None]:
    """Processors that only tell `plans` what goes into the self-attention sites at `paths`."""
    own = list_sites(unet, "self")
    chosen = [site for site in own if site.path in paths]
    _refuse_unusable(chosen, own)
    with ExitStack() as stack:
        for site in chosen:
            _replace(stack, site, RoutedProcessor(site.path, site.module.processor, plans))
        yield


def _replace(stack: ExitStack, site: AttentionSite, processor: Any) -> None:
    stack.callback(site.module.set_processor, site.module.processor)
    site.module.set_processor(processor)


def _copy_feature(unet: nn.Module, feature: FeatureCopy, sites: int, session: Session) -> Any:
    path = feature.module(sites)
    try:
        module = unet.get_submodule(path)
    except AttributeError as error:
        raise ControlError(f"the UNet has no module {path!r} whose features could be copied") from error

    def copy(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        streams = session.copies(feature.path)
        if streams is None:
            return output
        return _rows_of(output, [i if row.role == "source" else streams.source_of(i) for i, row in enumerate(streams.rows)])

    return module.register_forward_hook(copy)


def reading(unet: nn.Module, program: Program, run: Run) -> dict[int, list[str]] | None:
    """Step -> the sites that read the source then; None where something but routes of the first source needs its rows."""
    edits = any(edit.reads_source for edit in program.cross)
    if program.features or edits or program.wants_maps or any("style" in route.reads for route in program.routes):
        return None
    chosen = assign(program.routes, list_sites(unet, "self"), run)
    found: dict[int, list[str]] = {}
    for step in range(run.first_step, run.num_steps):
        active = (p for p, routes in chosen.items() if any(r.reads and r.active(step, run.num_steps) for r in routes))
        found[step] = list(active)
    return found


def _rows_of(output: Any, rows: list[int]) -> Any:
    """The rows of every tensor of a module's output."""
    if isinstance(output, Tensor):
        return output[rows]
    return type(output)(_rows_of(part, rows) for part in output) if isinstance(output, tuple | list) else output


def assign(routes: Sequence[Route], sites: Sequence[AttentionSite], run: Run) -> dict[str, list[Route]]:
    """Routes by the path of the sites they act at. Raises ControlError where one finds none or two meet."""
    chosen: dict[str, list[Route]] = {}
    for route in routes:
        found = select_sites(sites, route.sites, run.latent_size)
        if not found:
            raise ControlError(
                f"sites {route.sites!r} match none of the UNet's {len(sites)} self-attention sites; write {ALLOWED}"
            )
        if not any(route.active(step, run.num_steps) for step in range(run.first_step, run.num_steps)):
            remedy = f" after the {run.first_step} that are skipped; end later" if run.first_step else "; start earlier"
            raise ControlError(f"steps {route.start} to {route.stop} hold none of the run's {run.num_steps} steps{remedy}")
        for site in found:
            _refuse_overlap(route, chosen.setdefault(site.path, []), site, run.num_steps)
            chosen[site.path].append(route)
    return chosen


def _refuse_overlap(route: Route, others: Sequence[Route], site: AttentionSite, num_steps: int) -> None:
    for step in range(num_steps):
        if route.active(step, num_steps) and any(other.active(step, num_steps) for other in others):
            raise ControlError(f"two routes meet at {site.path} at step {step}; give them different sites or steps")


def _refuse_unusable(touched: Sequence[AttentionSite], sites: Sequence[AttentionSite]) -> None:
    if any(isinstance(site.module.processor, OURS) for site in sites):
        raise ControlError("this UNet is already under attention control; finish that edit first, or use a second UNet")
    if any(type(site.module.processor).__name__.startswith("Sliced") for site in touched):
        raise ControlError(
            "the UNet works in attention slices, which a controller would undo; call pipe.disable_attention_slicing(), and for "
            "less memory EditPipeline.enable_low_memory()"
        )
    if any(isinstance(site.module.processor, FusedAttnProcessor2_0) for site in touched):
        raise ControlError("the UNet's attention projections are fused; call unfuse_qkv_projections() before editing")
    if any("IPAdapter" in type(site.module.processor).__name__ for site in touched if site.kind == "cross"):
        raise ControlError("this controller changes cross-attention, which an IP-Adapter holds; unload it, or use masactrl")
