"""Every change to vLLM, each with what it replaces and why. What is called here lies beside this file.

A patch wraps vLLM's own function and calls it: none is copied. All of them are made or, where one of the functions is
not there, none.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

_log = logging.getLogger("vllm.plugins.dora_serve")

WORKER_MODULE = "vllm.lora.worker_manager"
"""What loads adapters and puts them into slots: imported by the processes that run the model, and by no other."""

RUNNER_MODULE = "vllm.v1.worker.lora_model_runner_mixin"
SERVER_MODULE = "vllm.entrypoints.openai.models.serving"

BLAMED = "dora-serve: "
"""What an error about an adapter has in its message: between processes nothing else of it is left."""

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values of max_lora_rank that vLLM takes."""

_MAGNITUDE = "lora_magnitude_vector"
_Patch = tuple[Any, str, Callable[[Callable[..., Any]], Callable[..., Any]]]


def patch_worker() -> None:
    """The processes that run the model: read magnitudes, take norms, scale outputs."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.layers import (
        base,
        base_linear,
        classifier,
        column_parallel_linear,
        logits_processor,
        row_parallel_linear,
        vocab_parallel_embedding,
    )
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.peft_helper import PEFTHelper
    from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager, WorkerLoRAManager
    from vllm.platforms import current_platform

    from dora_serve.vllm_plugin.scaling import define_operator

    linear = base_linear.BaseLinearLayerWithLoRA
    made = _apply(
        # Reading.
        (PEFTHelper, "from_local_dir", _look_at_the_folder),
        (PEFTHelper, "_validate_features", _accept_dora),
        (PEFTHelper, "validate_legal", _say_how_to_raise_the_rank),
        (LoRAModel, "from_local_checkpoint", _read_beside_magnitudes),
        (LoRAModel, "from_lora_tensors", _keep_magnitudes),
        (WorkerLoRAManager, "_load_adapter", _take_norms),
        (LRUCacheWorkerLoRAManager, "_apply_adapters", _load_in_one_order),
        # Slots.
        (LoRAModelManager, "__init__", _remember_base),
        (base.BaseLayerWithLoRA, "set_mapping", _allocate_scales),
        (LoRAModelManager, "activate_adapter", _fill_slot),
        (PunicaWrapperBase, "__init__", _add_batch),
        (PunicaWrapperBase, "_update_base_metadata", _look_at_batch),
        # The forward: the four places where vLLM adds s B A x to the output of a linear layer, and the three others.
        # The head of a classifier inherits the second of the four: it has to be wrapped before that is.
        (classifier.ClassificationHeadWithLoRA, "_apply_base_forward", _scale_requests),
        (linear, "apply", _scale_output),
        (linear, "_apply_base_forward", _scale_output),
        (column_parallel_linear, "_mcp_apply", _scale_output_of_sharded),
        (row_parallel_linear.RowParallelLinearWithShardedLoRA, "apply", _scale_output),
        (vocab_parallel_embedding.VocabParallelEmbeddingWithLoRA, "forward", _scale_output),
        (logits_processor.LogitsProcessorWithLoRA, "_get_logits", _scale_logits),
        (LoRAConfig, "compute_hash", _tell_compiled_graphs_apart),
        # Faults of vLLM's, with LoRA as with DoRA: in the embeddings of its Transformers backend, and on CPUs.
        (vocab_parallel_embedding.VocabParallelEmbeddingWithLoRA, "forward", _look_up_each_token),
        (vocab_parallel_embedding.VocabParallelEmbeddingWithLoRA, "set_lora", _scale_as_the_embedding),
        (PunicaWrapperCPU, "update_metadata", _keep_off_the_base),
    )
    if made:
        # What vLLM makes by itself to warm up and to capture graphs has this; `_keep_magnitudes` says None for a LoRA.
        LoRAModel.norm_scales = MappingProxyType({})
        LoRAModel.trained = None
        define_operator(current_platform.dispatch_key)
        _log.info("dora-serve: DoRA adapters are served like LoRA.")


def patch_runner() -> None:
    """The same processes, where the weights of the base change."""
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    _apply((LoRAModelRunnerMixin, "reset_lora_state", _forget_base))


def patch_server() -> None:
    """The process that answers HTTP."""
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    _apply((OpenAIServingModels, "load_lora_adapter", _blame_the_adapter))


def _apply(*patches: _Patch) -> bool:
    """Make all of the patches, or none and say why."""
    missing = [f"{owner.__name__}.{name}" for owner, name, _ in patches if not hasattr(owner, name)]
    if missing:
        _log.warning("dora-serve: this vLLM has no %s: it stays as it is.", ", ".join(missing))
        return False
    for owner, name, patch in patches:
        original = vars(owner).get(name) or getattr(owner, name)  # the latter where it is inherited
        if isinstance(original, classmethod):
            setattr(owner, name, classmethod(_wrapped(original.__func__, patch)))
        else:
            setattr(owner, name, _wrapped(original, patch))
    return True


def _wrapped(original: Callable[..., Any], patch: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Any:
    return functools.wraps(original)(patch(original))


def _look_at_the_folder(original: Callable[..., Any]) -> Callable[..., Any]:
    """PEFTHelper.from_local_dir takes a folder without a configuration for one that is not there, and whatever the
    configuration holds for numbers."""

    def from_local_dir(cls: Any, lora_path: str, *args: Any, **kwargs: Any) -> Any:
        from dora_serve.vllm_plugin.reading import require_adapter

        require_adapter(Path(lora_path))
        return original(cls, lora_path, *args, **kwargs)

    return from_local_dir


def _accept_dora(original: Callable[..., Any]) -> Callable[..., Any]:
    """PEFTHelper._validate_features says "vLLM does not yet support DoRA."; all else that it says stands."""

    def validate_features(self: Any) -> Any:
        return original(dataclasses.replace(self, use_dora=False))

    return validate_features


def _say_how_to_raise_the_rank(original: Callable[..., Any]) -> Callable[..., Any]:
    """PEFTHelper.validate_legal refuses a rank above max_lora_rank, and does not say what to do."""

    def validate_legal(self: Any, lora_config: Any) -> None:
        try:
            original(self, lora_config)
        except ValueError as error:
            rank = max([self.r, *self.rank_pattern.values()])
            if rank <= lora_config.max_lora_rank:
                raise
            allowed = next((one for one in RANKS if one >= rank), None)
            restart = "" if allowed is None else f"start the server with --max-lora-rank {allowed}, or "
            raise ValueError(f"{error} {BLAMED}{restart}merge the adapter: `dora-export merge`.") from error

    return validate_legal


def _read_beside_magnitudes(original: Callable[..., Any]) -> Callable[..., Any]:
    """LoRAModel.from_local_checkpoint takes every tensor for a lora_A or a lora_B, and refuses other names.

    It leaves out what begins with a `skip_prefix`, and hands all tensors on to `from_lora_tensors`, where the
    magnitudes are found again. Norm scales lie in a file beside, which it does not look at.
    """

    def from_local_checkpoint(
        cls: Any, lora_dir: str, *args: Any, skip_prefixes: list[str] | None = None, **kwargs: Any
    ) -> Any:
        from dora_serve.norm_scale_file import FILE_NAME, read_norm_scales
        from dora_serve.vllm_plugin.reading import in_words

        skipped = [*(skip_prefixes or ()), _MAGNITUDE]
        try:
            model = original(cls, lora_dir, *args, skip_prefixes=skipped, **kwargs)
        except Exception as error:
            words = in_words(error, lora_dir)
            if words is None:
                raise
            raise words from error
        if model.trained is not None:
            model.norm_scale_file = read_norm_scales(Path(lora_dir))
            model.brings_norm_scales = (Path(lora_dir) / FILE_NAME).is_file()
        return model

    return from_local_checkpoint


def _keep_magnitudes(original: Callable[..., Any]) -> Callable[..., Any]:
    """LoRAModel.from_lora_tensors knows lora_A and lora_B only: it is given those, and the model keeps the others."""

    def from_lora_tensors(
        cls: Any, lora_model_id: int, tensors: dict[str, Any], peft_helper: Any, *args: Any, **kwargs: Any
    ) -> Any:
        from dora_serve.vllm_plugin.reading import split_magnitudes

        skipped = [prefix for prefix in kwargs.pop("skip_prefixes", None) or () if prefix != _MAGNITUDE]
        wanted = {name: one for name, one in tensors.items() if not cls._should_skip_module(name, skipped)}
        factors, trained = split_magnitudes(wanted, peft_helper.use_dora, kwargs.get("weights_mapper"))
        model = original(cls, lora_model_id, factors, peft_helper, *args, **kwargs)
        model.trained, model.norm_scales = trained, None
        return model

    return from_lora_tensors


def _take_norms(original: Callable[..., Any]) -> Callable[..., Any]:
    """WorkerLoRAManager._load_adapter makes the LoRAModel: a DoRA gets its norm scales here, and a LoRA is looked at.

    They stay with the model, so that caches, pinning and replacement treat them as one. Nothing has been registered
    or replaced yet when an error is raised.
    """

    def load_adapter(self: Any, lora_request: Any) -> Any:
        from dora_serve.vllm_plugin.norm_scales import finished, local_norms, sum_over_group
        from dora_serve.vllm_plugin.placing import require_fit

        manager, lora, found, error = self._adapter_manager, None, [], None
        try:
            lora = original(self, lora_request)
            if lora.trained is None:
                require_fit(manager, lora)
            else:
                base = manager.dora_base
                trained = base.with_known_scales(lora.trained, getattr(lora, "norm_scale_file", None))
                if getattr(lora, "brings_norm_scales", False) and not trained.precomputed:
                    _log.warning(
                        "dora-serve: the norm scales in %r are those of another base or adapter, and are taken anew.",
                        lora_request.lora_path,
                    )
                found = local_norms(manager, lora, trained, base.squares)
        except Exception as caught:  # the other processes wait for an answer, whatever it is
            error = _blaming(caught)
        sum_over_group(found, error)
        assert lora is not None
        if lora.trained is not None:
            lora.norm_scales = finished(found)
            # Host memory that the device can read by itself, as vLLM holds the factors.
            if manager.device.type == "cuda":
                lora.norm_scales = {name: scale.pin_memory() for name, scale in lora.norm_scales.items()}
            lora.trained = None
        return lora

    return load_adapter


def _blaming(error: Exception) -> Exception:
    """The error with `BLAMED` in it where the adapter is to blame."""
    from dora_serve.errors import DoraServeError

    if isinstance(error, DoraServeError):
        return ValueError(f"{BLAMED}{error}")
    if isinstance(error, ValueError) and BLAMED not in str(error):
        remedy = "vLLM cannot serve this adapter; `dora-export merge` may fold it into the base, which it can."
        return ValueError(f"{error} {BLAMED}{remedy}")
    return error


def _load_in_one_order(original: Callable[..., Any]) -> Callable[..., Any]:
    """LRUCacheWorkerLoRAManager._apply_adapters loads what is missing in the order of a set, which differs between
    processes; but those of a tensor-parallel group take the norms of one adapter together."""

    def apply_adapters(self: Any, lora_requests: Any) -> None:
        original(self, sorted((one for one in lora_requests if one), key=lambda one: one.lora_int_id))

    return apply_adapters


def _remember_base(original: Callable[..., Any]) -> Callable[..., Any]:
    """LoRAModelManager.__init__ knows which base is served; norm scales from a file hold for that one alone."""

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        from dora_serve.vllm_plugin.reading import ServedBase

        self.dora_base = ServedBase(kwargs["vllm_config"])
        original(self, *args, **kwargs)

    return init


def _allocate_scales(original: Callable[..., Any]) -> Callable[..., Any]:
    """BaseLayerWithLoRA.set_mapping is called once for each layer when its lora_a_stacked has been allocated: its norm
    scales are allocated with them."""

    def set_mapping(self: Any, punica_wrapper: Any) -> None:
        from dora_serve.vllm_plugin import layers
        from dora_serve.vllm_plugin.scaling import SlotScales

        original(self, punica_wrapper)
        if layers.is_linear(self) or layers.is_embedding(self) or layers.is_head(self):
            stacked = self.lora_a_stacked
            device = (stacked[0] if isinstance(stacked, tuple) else stacked).device
            bias = layers.added_bias(self)
            self.slot_scales = SlotScales(layers.slots_of(self), layers.width_of(self), device, bias)

    return set_mapping


def _fill_slot(original: Callable[..., Any]) -> Callable[..., Any]:
    """LoRAModelManager.activate_adapter copies lora_A and lora_B into a slot: norm scales go along."""

    def activate_adapter(self: Any, lora_id: int) -> Any:
        if not original(self, lora_id):
            return False
        slot = self.lora_index_to_id.index(lora_id)
        scales: Mapping[str, Any] | None = self._registered_adapters[lora_id].norm_scales
        batches = [wrapper.dora for wrapper in self.punica_wrapper_mapping.values()]
        if scales is not None or any(slot in batch.slots for batch in batches):
            for name, module in self.modules.items():
                if hasattr(module, "slot_scales"):
                    module.slot_scales.set(slot, None if scales is None else scales.get(name))
                    if scales is not None and not scales:
                        # A dummy, which stands for any adapter in a graph that is captured: no layer may be left out.
                        module.slot_scales.slots.add(slot)
        for batch in batches:
            (batch.slots.discard if scales is None else batch.slots.add)(slot)
        # vLLM looks at a batch again where its adapters or their slots are others; one replaced in place is neither.
        self._last_mapping = None
        return True

    return activate_adapter


def _add_batch(original: Callable[..., Any]) -> Callable[..., Any]:
    """PunicaWrapperBase.__init__: here it gets what `_look_at_batch` fills in."""

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        from dora_serve.vllm_plugin.scaling import Batch

        original(self, *args, **kwargs)
        self.dora = Batch(self._token_lora_indices)

    return init


def _look_at_batch(original: Callable[..., Any]) -> Callable[..., Any]:
    """PunicaWrapperBase._update_base_metadata maps the batch's tokens to slots: here it shows whether any needs norm
    scales, so that a batch of LoRA and base alone does nothing more than before."""

    def update_base_metadata(self: Any, mapping: Any, lora_index_to_id: Any, *args: Any, **kwargs: Any) -> None:
        original(self, mapping, lora_index_to_id, *args, **kwargs)
        self.dora.update(self._token_lora_indices, mapping.index_mapping, lora_index_to_id)

    return update_base_metadata


def _scale_output(original: Callable[..., Any]) -> Callable[..., Any]:
    """Where vLLM has W x + s B A x + bias: BaseLinearLayerWithLoRA.apply and _apply_base_forward,
    RowParallelLinearWithShardedLoRA.apply, and VocabParallelEmbeddingWithLoRA.forward.

    A row-parallel layer has a part of the sum here; scaling the parts scales the sum.
    """

    from torch.compiler import is_compiling

    from dora_serve.vllm_plugin.scaling import scale_output

    def apply(self: Any, x: Any, *args: Any) -> Any:
        output = original(self, x, *args)
        # Looked at here already: a step without a DoRA comes by for every layer.
        return scale_output(self, output) if self.punica_wrapper.dora.any_in_use or is_compiling() else output

    return apply


def _scale_output_of_sharded(original: Callable[..., Any]) -> Callable[..., Any]:
    """column_parallel_linear._mcp_apply: the same, for column-parallel layers with fully_sharded_loras."""

    from dora_serve.vllm_plugin.scaling import scale_output

    def mcp_apply(x: Any, bias: Any, layer: Any) -> Any:
        return scale_output(layer, original(x, bias, layer))

    return mcp_apply


def _scale_requests(original: Callable[..., Any]) -> Callable[..., Any]:
    """ClassificationHeadWithLoRA._apply_base_forward: the same for a head whose rows are requests."""

    from dora_serve.vllm_plugin.scaling import scaled_requests

    def apply_base_forward(self: Any, x: Any) -> Any:
        return scaled_requests(self, original(self, x))

    return apply_base_forward


def _scale_logits(original: Callable[..., Any]) -> Callable[..., Any]:
    """LogitsProcessorWithLoRA._get_logits: the same for lm_head, whose rows are requests. It runs outside of graphs."""

    from dora_serve.vllm_plugin.scaling import scaled_requests

    def get_logits(self: Any, *args: Any, **kwargs: Any) -> Any:
        logits = original(self, *args, **kwargs)
        return None if logits is None else scaled_requests(self, logits)

    return get_logits


def _forget_base(original: Callable[..., Any]) -> Callable[..., Any]:
    """LoRAModelRunnerMixin.reset_lora_state is called when the weights of the base were replaced while it serves, or
    all memory was given away and taken back (sleep mode): norms are others, and buffers hold anything."""

    def reset_lora_state(self: Any) -> None:
        original(self)
        if self.lora_config:
            manager = self.lora_manager._adapter_manager
            manager.dora_base.weights_were_replaced()
            for module in manager.modules.values():
                if hasattr(module, "slot_scales"):
                    module.slot_scales.reset()

    return reset_lora_state


def _tell_compiled_graphs_apart(original: Callable[..., Any]) -> Callable[..., Any]:
    """LoRAConfig.compute_hash is part of the key of vLLM's cache of compiled graphs: one that was compiled without the
    patches must not be taken for one with them, and the other way round."""

    def compute_hash(self: Any) -> str:
        from dora_serve import __version__

        return f"{original(self)}-dora-serve-{__version__}"

    return compute_hash


def _look_up_each_token(original: Callable[..., Any]) -> Callable[..., Any]:
    """VocabParallelEmbeddingWithLoRA.forward takes rows for tokens. vLLM's Transformers backend has all tokens in one
    row, and each of them got lora_A of the first one's adapter."""

    def forward(self: Any, x: Any) -> Any:
        return original(self, x.flatten()).view(*x.shape, -1)

    return forward


def _scale_as_the_embedding(original: Callable[..., Any]) -> Callable[..., Any]:
    """VocabParallelEmbeddingWithLoRA.set_lora: in vLLM's Transformers backend an embedding may multiply what it looks
    up, as Gemma's do, and what an adapter adds has to be multiplied as well."""

    def set_lora(self: Any, index: int, lora_a: Any, lora_b: Any) -> None:
        scale = getattr(self.base_layer, "embed_scale", None)
        original(self, index, lora_a, lora_b if scale is None else lora_b * float(scale))

    return set_lora


def _keep_off_the_base(original: Callable[..., Any]) -> Callable[..., Any]:
    """PunicaWrapperCPU takes -1, the slot of the base's tokens, for the last slot, and adds the LoRA that is there to
    them wherever a batch holds tokens of both (vLLM's pull request 48421 mends it).

    For such a batch three of its functions are replaced, in the object: a step calls them for every layer, and one for
    any other batch is to pay nothing.
    """

    def update_metadata(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in ("add_shrink", "add_lora_embedding", "add_lora_logits"):
            vars(self).pop(name, None)
        original(self, *args, **kwargs)
        tokens, requests = self.token_lora_indices < 0, self.sampler_indices < 0
        if bool(tokens.any()) and not self.no_lora:
            self.add_shrink = _shrink_of_others(self.add_shrink, tokens.unsqueeze(1))
            self.add_lora_embedding = _embedding_of_others(self.add_lora_embedding, tokens.unsqueeze(1))
        if bool(requests.any()):
            self.add_lora_logits = _logits_of_others(self.add_lora_logits, requests.unsqueeze(1))

    return update_metadata


def _shrink_of_others(original: Callable[..., None], of_base: Any) -> Callable[..., None]:
    """A x is 0 for the base's tokens, and so is what is added to them."""

    def add_shrink(y: Any, *args: Any, **kwargs: Any) -> None:
        original(y, *args, **kwargs)
        for of_slice in y:
            of_slice.masked_fill_(of_base, 0)

    return add_shrink


def _embedding_of_others(original: Callable[..., None], of_base: Any) -> Callable[..., None]:
    """x is what was looked up in lora_A."""

    def add_lora_embedding(y: Any, x: Any, *args: Any, **kwargs: Any) -> None:
        original(y, x.masked_fill(of_base, 0), *args, **kwargs)

    return add_lora_embedding


def _logits_of_others(original: Callable[..., None], of_base: Any) -> Callable[..., None]:
    """x are the hidden states, of which vLLM needs nothing else here."""

    def add_lora_logits(y: Any, x: Any, *args: Any, **kwargs: Any) -> None:
        original(y, x.view(-1, x.shape[-1]).masked_fill(of_base, 0), *args, **kwargs)

    return add_lora_logits


def _blame_the_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    """OpenAIServingModels.load_lora_adapter answers 500 for an adapter that cannot be loaded, as if the server were
    broken. It is the request that is wrong: 400, with the same words."""

    async def load_lora_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        response = await original(self, *args, **kwargs)
        error = getattr(response, "error", None)
        if error is not None and error.code == 500 and BLAMED in error.message:
            error.code, error.type = 400, "BadRequestError"
        return response

    return load_lora_adapter
