"""What an ONNX export would write, and what it takes, known from headers before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod

import torch

from dora_serve.checkpoint import read_json
from dora_serve.forward_memory import elements_of, planned_memory
from dora_serve.memory import available_memory
from dora_serve.pipeline_plan import PipelinePlan
from dora_serve.plan import MergePlan, TensorPlan
from exporters.onnx import graph_cache
from exporters.onnx.architectures import Kind, architecture_of, kind_of
from exporters.onnx.check.memory import compared_memory
from exporters.onnx.components import component_of
from exporters.onnx.encoder_decoder import DECODER_FILE, ENCODER_FILE
from exporters.onnx.options import OnnxOptions
from exporters.onnx.saving import MODEL_FILE
from exporters.onnx.skeleton import DATA_FILE
from exporters.onnx.vision_language import EMBEDDING_FILE, VISION_FILE

_GRAPHS: Mapping[Kind, tuple[str, ...]] = {
    "decoder": (MODEL_FILE,),
    "plain": (MODEL_FILE,),
    "encoder-decoder": (ENCODER_FILE, DECODER_FILE),
    "vision-language": (VISION_FILE, EMBEDDING_FILE, DECODER_FILE),
}
_BLOCK = 32


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What is foreseen of graphs, whatever model they are of. opset: None where the builder chooses. bytes: of graphs
    and data, about. memory_bytes: enough for the verification, the forward of the merge among it; None without one.
    available_bytes: what there is, None where the system does not say.
    """

    dtype: str
    quantize: str | None
    opset: int | None
    provider: str
    bytes: int
    memory_bytes: int | None
    available_bytes: int | None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class OnnxForecast(Forecast):
    """Of one model. route: who makes the graphs. files: of the output, without configuration and tokenizer. cached:
    whether the traced graph is in the cache, None where that is not known before the merge or nothing is traced.
    """

    route: str
    architecture: str
    files: tuple[str, ...]
    cached: bool | None


@dataclass(frozen=True, kw_only=True)
class PipelineForecast(Forecast):
    """Of a pipeline. graphs: the folders of the graphs of each component, none for one that stays as safetensors.
    memory_bytes: of the component that takes most.
    """

    graphs: Mapping[str, tuple[str, ...]]


def forecast(plan: MergePlan, options: OnnxOptions, *, adapter_file: str | None = None) -> OnnxForecast:
    """Of `--to onnx`, or with the name of an adapter's file of `--to onnx-adapters`, which exports the base itself."""
    architecture = architecture_of(plan.base.folder, becomes_dense=True)
    genai = options.runtime == "genai"
    files = (*_GRAPHS[kind_of(architecture)], DATA_FILE, *(("genai_config.json",) if genai else ()))
    size = _nbytes(plan, options)
    return OnnxForecast(
        route="ONNX Runtime GenAI's builder" if genai else "torch.onnx.export (dynamo)",
        architecture=architecture,
        files=(*files, *((adapter_file,) if adapter_file else ())),
        dtype=options.dtype,
        quantize=options.quantize,
        opset=None if genai else options.opset,
        provider=options.provider,
        cached=None if genai else _is_cached(plan, options, architecture, base_alone=adapter_file is not None),
        bytes=size,
        memory_bytes=max(planned_memory(plan), _compared(plan, size)),
        available_bytes=available_memory(),
        notes=provider_notes(options),
    )


def forecast_pipeline(plan: PipelinePlan, options: OnnxOptions) -> PipelineForecast:
    """Of `--to onnx`. Whether the graphs are in the cache is not looked up."""
    graphs = {name: component_of(plan.base.folder / name).parts for name in plan.components}
    sizes = {name: _nbytes(plan.components[name], options) for name, parts in graphs.items() if parts}
    needed = [
        *(planned_memory(plan.components[name]) for name in plan.adapted),
        *(_compared(plan.components[name], size) for name, size in sizes.items()),
    ]
    return PipelineForecast(
        graphs=graphs,
        dtype=options.dtype,
        quantize=options.quantize,
        opset=options.opset,
        provider=options.provider,
        bytes=sum(sizes.values()),
        memory_bytes=max(needed, default=0),
        available_bytes=available_memory(),
        notes=provider_notes(options),
    )


def provider_notes(options: OnnxOptions) -> tuple[str, ...]:
    """What is to be said where graphs are for a provider that this machine's ONNX Runtime does not have."""
    import onnxruntime

    # The GPU build names the provider on machines without a GPU too.
    here = torch.cuda.is_available() and "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if options.provider == "cpu" or here:
        return ()
    return (
        "The graphs are for CUDA, which ONNX Runtime does not have here: what can be compared is compared on its CPU "
        "provider, and nothing was run on a GPU.",
    )


def _compared(plan: MergePlan, size: int) -> int:
    return compared_memory(elements_of(plan.tensors.values()), size, read_json(plan.base.folder))


def _nbytes(plan: MergePlan, options: OnnxOptions) -> int:
    itemsize: int = getattr(torch, options.dtype).itemsize
    vocabulary = _vocabulary(read_json(plan.base.folder))
    tables = [tensor for tensor in plan.tensors.values() if _is_table(tensor, vocabulary)]

    def size(tensor: TensorPlan) -> float:
        count = prod(tensor.shape)
        looked_up = len(tables) > 1 and tensor.name == tables[0].name  # a tied table is quantized, one apart is not
        if options.bits is None or len(tensor.shape) < 2 or not tensor.dtype.is_floating_point or looked_up:
            return count * itemsize
        return count * (options.bits / 8 + itemsize / _BLOCK)

    return int(sum(map(size, plan.tensors.values())))


def _is_table(tensor: TensorPlan, vocabulary: int | None) -> bool:
    return len(tensor.shape) == 2 and tensor.shape[0] == vocabulary


def _vocabulary(config: Mapping[str, object]) -> int | None:
    text = config.get("text_config")
    for table in (config, text if isinstance(text, dict) else {}):
        if isinstance(size := table.get("vocab_size"), int):
            return size
    return None


def _is_cached(plan: MergePlan, options: OnnxOptions, architecture: str, *, base_alone: bool) -> bool | None:
    from exporters.onnx.export import trace_key
    from exporters.onnx.stored import stored_weights

    same = not plan.config_changes and set(plan.tensors) == set(plan.base.tensors)
    if not (base_alone or same) or plan.base.quantization is not None:
        return None
    if options.cache is None:
        return False
    key = trace_key(plan.base.folder, architecture, stored_weights(plan.base.folder, architecture), options)
    return graph_cache.holds(options.cache, key)
