"""A merged diffusers pipeline as ONNX folders, in Optimum's layout: unet/model.onnx, vae_decoder/model.onnx, ...

Each graph has its weights beside it, in model.onnx.data of its folder. What is no graph (schedulers, tokenizers) is
copied, and a model for which there is none here stays as safetensors, which the notes say.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_serve.checkpoint import read_json, side_files
from dora_serve.errors import UnavailableError
from dora_serve.model_classes import DIFFUSERS_KEY
from exporters.onnx import graph_cache
from exporters.onnx.export import Built, OnnxExport, trace_key, write_graphs
from exporters.onnx.loading import quiet, require
from exporters.onnx.options import OnnxOptions, require_possible
from exporters.onnx.saving import MODEL_FILE
from exporters.onnx.stored import StoredWeights, plainly_stored, stored_weights
from exporters.onnx.traceable import Traceable

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode

_TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")
VAE_PARTS = ("vae_encoder", "vae_decoder")


@dataclass(frozen=True)
class Component:
    """A model of the pipeline. parts: the folders that its graphs go to, empty for one that gets none."""

    name: str
    class_name: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class PipelineExport:
    """graphs: by folder. kept: components that are safetensors still."""

    graphs: Mapping[str, OnnxExport]
    kept: tuple[str, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        return {
            "graphs": {folder: export.to_json() for folder, export in self.graphs.items()},
            "kept": list(self.kept),
            "notes": list(self.notes),
        }


def component_of(folder: Path) -> Component:
    """What the configuration of a component's folder says. No weights are read, and no model code is run."""
    config = read_json(folder)
    name, own = folder.name, config.get(DIFFUSERS_KEY)
    if isinstance(own, str):
        is_vae = name.startswith("vae") or own.startswith("Autoencoder")
        return Component(name, own, VAE_PARTS if is_vae else (name,))
    named = config.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else "no architecture"
    return Component(name, architecture, (name,) if architecture in _TEXT_ENCODERS else ())


def require_exportable(options: OnnxOptions, adapted: tuple[str, ...], folder: Path) -> None:
    """Raise UnavailableError for what can be known before anything is merged: a runtime that takes no pipelines, or an
    adapter on a component that gets no graph."""
    require("onnx", "onnxscript", "onnxruntime", "transformers", "diffusers")
    require_possible(options)
    if options.runtime == "genai":
        raise UnavailableError(
            "ONNX Runtime GenAI runs language models, and this is a diffusers pipeline.", remedy="Leave out --runtime."
        )
    for name in adapted:
        component = component_of(folder / name)
        if not component.parts:
            raise UnavailableError(
                f"The adapter changes {name}, a {component.class_name}, for which there is no graph here.",
                remedy="Export safetensors instead (--to safetensors).",
                architecture=component.class_name,
            )


def export_pipeline(
    merged: Path,
    out: Path,
    components: tuple[str, ...],
    options: OnnxOptions,
    *,
    metadata: Mapping[str, Mapping[str, str]] | None = None,
    on_progress: Callable[[str], None] = lambda message: None,
) -> PipelineExport:
    """Write `out`, which exists, from the pipeline in `merged`, whose components with weights are named.

    metadata: further `metadata_props` of the graphs of each component.

    Peak memory as `export_onnx`. Raises what that raises; for a component that torch cannot trace UnavailableError
    where it is the denoiser, and a note where the pipeline is of use without it.
    """
    graphs: dict[str, OnnxExport] = {}
    kept, notes = [], []
    for name in components:
        component = component_of(merged / name)
        try:
            graphs |= _export_component(
                merged / name, out, component, options, (metadata or {}).get(name, {}), on_progress
            )
        except UnavailableError as error:
            if name in ("unet", "transformer", "prior"):
                raise
            notes.append(f"{name} stays as safetensors: {error.message}")
            for part in component.parts:
                shutil.rmtree(out / part, ignore_errors=True)
            component = Component(name, component.class_name, ())
        if not component.parts:
            kept.append(name)
            shutil.copytree(merged / name, out / name, dirs_exist_ok=True)
    if missing := [name for name in kept if not any(note.startswith(f"{name} ") for note in notes)]:
        notes.append(f"{', '.join(missing)}: no graph is made of these, which stay as safetensors.")
    for relative in side_files(merged):
        if relative.parts[0] not in components:
            (out / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(merged / relative, out / relative)
    return PipelineExport(graphs, tuple(kept), tuple(notes))


def _export_component(
    folder: Path,
    out: Path,
    component: Component,
    options: OnnxOptions,
    metadata: Mapping[str, str],
    tell: Callable[[str], None],
) -> dict[str, OnnxExport]:
    made = {}
    for part in component.parts:
        (out / part).mkdir(parents=True, exist_ok=True)
        with quiet():
            weights = weights_of(folder, component)
            key = graph_cache.digest_of(
                {
                    "of": trace_key(folder, component.class_name, weights, options),
                    "part": part if part in VAE_PARTS else "",
                    "diffusers": version("diffusers"),
                }
            )
            build = partial(_build, folder, component, part, weights, options)
            made[part] = write_graphs(component.class_name, weights, key, build, out / part, options, metadata, tell)
        for relative in side_files(folder):
            (out / part / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / relative, out / part / relative)
    return made


def weights_of(folder: Path, component: Component) -> StoredWeights:
    """The stored tensors of a component by their run-time names."""
    if component.class_name in _TEXT_ENCODERS:
        return stored_weights(folder, component.class_name)
    return plainly_stored(folder)


def _build(
    folder: Path,
    component: Component,
    part: str,
    weights: StoredWeights,
    options: OnnxOptions,
    mode: FakeTensorMode,
    attention: str | None,
) -> Built:
    import torch

    from exporters.onnx.diffusion import denoiser_graph, empty_component, text_encoder_graph, vae_graphs
    from exporters.onnx.empty_model import empty_model

    dtype = getattr(torch, options.dtype)
    model: Any
    make: Callable[[], Traceable]
    if component.class_name in _TEXT_ENCODERS:
        model = empty_model(folder, dtype, weights, mode, attention, architecture=component.class_name)
        make = partial(text_encoder_graph, model)
    else:
        if attention is not None:
            raise ValueError("diffusers chooses the attention itself")
        model = empty_component(folder, dtype, weights, mode)
        make = (lambda: vae_graphs(model)[part]) if part in VAE_PARTS else partial(denoiser_graph, model)
    return model, lambda: {MODEL_FILE: make()}
