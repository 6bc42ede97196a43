"""Whether a pipeline of graphs is whole: every model of the base as its graphs or as safetensors, and all else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dora_serve.checkpoint import CONFIG_NAME, read_json
from dora_serve.errors import CheckpointError
from dora_serve.pipeline_files import changed_files
from dora_serve.pipeline_folder import INDEX_NAME
from dora_serve.pipeline_plan import PipelinePlan
from dora_serve.pipeline_verify import check_copy
from dora_serve.structure_check import difference
from exporters.onnx.components import component_of
from exporters.onnx.saving import MODEL_FILE


def check_whole(out: Path, merged: Path, plan: PipelinePlan) -> tuple[str, ...]:
    """What the ONNX pipeline in `out` lacks of the one in `merged`, and what beside the graphs is other, in sentences.

    The values of graphs are compared elsewhere (`check_components`).
    """
    found = [failure for name in plan.components for failure in _check_component(out, merged, plan, name)]
    return (*found, *_check_index(out, plan), *changed_files(plan, out))


def _check_component(out: Path, merged: Path, plan: PipelinePlan, name: str) -> Iterator[str]:
    parts = component_of(merged / name).parts
    graphs = [part for part in parts if (out / part / MODEL_FILE).is_file()]
    if graphs:
        yield from (f"{name}: {part}/{MODEL_FILE} is not there." for part in parts if part not in graphs)
        for part in graphs:
            yield from (f"{part}: {said}" for said in _check_config(merged / name, out / part))
    elif any((out / name).glob("*.safetensors")):
        yield from (f"{name}: {failure}" for failure in check_copy(plan.components[name], out / name).failures)
    else:
        changed = "the adapter changes it" if name in plan.adapted else "the base has it"
        yield f"{name}: {changed}, and the folder has no graph of it{' and no safetensors' if not parts else ''}."


def _check_config(wanted: Path, got: Path) -> Iterator[str]:
    if not (got / CONFIG_NAME).is_file():
        yield f"{CONFIG_NAME} is not there."
        return
    try:
        said = difference(read_json(wanted), read_json(got))
    except CheckpointError as error:
        said = error.message.removesuffix(".")
    if said is not None:
        yield f"{said}."


def _check_index(out: Path, plan: PipelinePlan) -> Iterator[str]:
    """Optimum gives its own classes there, ORT in front of diffusers' names."""
    try:
        index = read_json(out, INDEX_NAME)
    except CheckpointError as error:
        yield error.message
        return
    for key, wanted in plan.base.index.items():
        got = index.get(key)
        if got == wanted or (key.startswith("_") and key != "_class_name"):
            continue
        if key == "_class_name" and str(got).removeprefix("ORT") == wanted:
            continue
        by_optimum = isinstance(got, list) and str(got[:1]).startswith("['optimum")
        if key in plan.components and (by_optimum or key not in index):
            continue
        if wanted == [None, None] and key not in index:
            continue
        yield f"{INDEX_NAME} says {key} = {got!r}, wanted {wanted!r}."
