"""The models of a diffusers pipeline as graphs, inputs and outputs named as Optimum names them.

    unet/model.onnx             sample (batch, channels, height, width), timestep (), encoder_hidden_states (batch,
                                sequence, width); SDXL's: text_embeds (batch, width), time_ids (batch, 6)
                                -> out_sample
    transformer/model.onnx      hidden_states, encoder_hidden_states, pooled_projections, timestep (step); Flux's:
                                img_ids, txt_ids, guidance -> out_hidden_states
    vae_encoder/model.onnx      sample -> latent_parameters, mean and logarithm of the variance one after the other
    vae_decoder/model.onnx      latent_sample -> sample
    text_encoder/model.onnx     input_ids (batch, sequence) -> last_hidden_state, pooler_output or text_embeds, and
                                hidden_states.N of a CLIP

Height and width of latents are multiples of what the model's levels halve them by, as a pipeline's are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dora_serve.checkpoint import read_json
from dora_serve.denoiser_inputs import denoiser_samples, nested
from dora_serve.errors import UnavailableError
from dora_serve.model_classes import DIFFUSERS_KEY
from exporters.onnx.architectures import INSTEAD
from exporters.onnx.empty_model import empty_stored_buffers, is_fake, without_memory
from exporters.onnx.stored import StoredWeights
from exporters.onnx.traceable import Traceable

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode

_BATCH = 2
CONDITIONS = {"added_cond_kwargs.text_embeds": "text_embeds", "added_cond_kwargs.time_ids": "time_ids"}
_KNOWN_INPUTS = {
    *("sample", "hidden_states", "timestep", "encoder_hidden_states", "pooled_projections", "img_ids", "txt_ids"),
    *("guidance", *CONDITIONS),
}


def empty_component(folder: Path, dtype: torch.dtype, weights: StoredWeights, mode: FakeTensorMode) -> Any:
    """A model of diffusers in `dtype` whose parameters have shapes and no memory.

    Raises UnavailableError for one that is not diffusers' own, CheckpointError where the folder lacks a parameter.
    """
    import diffusers

    name = str(read_json(folder).get(DIFFUSERS_KEY))
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
        raise _refuse(name, f"it is no model of diffusers {diffusers.__version__}.")
    config: Any = kind.load_config(folder, local_files_only=True)
    with without_memory(mode):
        model: Any = kind.from_config(config).eval()
    for parameter in model.parameters():
        with mode:
            parameter.data = torch.empty(parameter.shape, dtype=dtype)
    for module in model.modules():
        for key, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and not is_fake(buffer):
                module._buffers[key] = buffer.to(dtype)
    weights.require_whole({key: tuple(value.shape) for key, value in model.named_parameters()}, name)
    empty_stored_buffers(model, weights, mode)
    return model


def denoiser_graph(model: Any) -> Traceable:
    """A UNet or a diffusion transformer. Raises UnavailableError where its inputs are not known."""
    name = type(model).__name__
    try:
        given = denoiser_samples(model).samples[0].inputs
    except ValueError as error:
        raise _refuse(name, f"{error}.") from error
    if "timestep" not in given or not given.keys() <= _KNOWN_INPUTS:
        raise _refuse(name, "it takes conditions for which Optimum has no names.")
    if any(value.ndim > 4 for value in given.values()):
        raise _refuse(name, "it denoises films, for which Optimum has no graph.")
    is_unet = "sample" in given
    spatial = _levels(model.config) if is_unet else int(getattr(model.config, "patch_size", None) or 1)
    dims = _denoiser_dims(given, spatial, is_unet)
    args = tuple(_example(key, value, is_unet).to(_dtype(value, model.dtype)) for key, value in given.items())

    class Denoiser(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, values: list[torch.Tensor]) -> torch.Tensor:
            named = nested(dict(zip(given, values, strict=True)))
            output: torch.Tensor = self.model(**named, return_dict=False)[0]
            return output

    return Traceable(
        module=Denoiser().eval(),
        inputs=tuple(CONDITIONS.get(key, key) for key in given),
        outputs=("out_sample" if is_unet else "out_hidden_states",),
        args=(list(args),),
        dynamic_shapes=([dims[key] for key in given],),
    )


def vae_graphs(model: Any) -> Mapping[str, Traceable]:
    """By the folder: encoder and decoder of a VAE of pictures. Raises UnavailableError for another kind."""
    if not hasattr(model, "encode") or not hasattr(model.config, "latent_channels") or _is_video(model):
        raise _refuse(type(model).__name__, "it is no VAE of pictures with a distribution of latents.")
    factor = _levels(model.config)

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, sample: torch.Tensor) -> torch.Tensor:
            parameters: torch.Tensor = self.model.encode(sample).latent_dist.parameters
            return parameters

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, latent_sample: torch.Tensor) -> torch.Tensor:
            decoded: torch.Tensor = self.model.decode(latent_sample).sample
            return decoded

    def graph(module: torch.nn.Module, channels: int, step: int, names: tuple[str, str]) -> Traceable:
        height, width = 4 * factor if step > 1 else 4, 6 * factor if step > 1 else 6
        picture = torch.zeros(_BATCH, channels, height, width, dtype=model.dtype)
        return Traceable(module.eval(), (names[0],), (names[1],), (picture,), (_spatial(step),))

    latents = int(model.config.latent_channels)
    return {
        "vae_encoder": graph(Encoder(), int(model.config.in_channels), factor, ("sample", "latent_parameters")),
        "vae_decoder": graph(Decoder(), latents, 1, ("latent_sample", "sample")),
    }


def text_encoder_graph(model: Any) -> Traceable:
    """A CLIP's text model, or a T5's encoder: token ids to what a denoiser is conditioned with."""
    from torch.export import Dim

    ids = torch.ones(_BATCH, 5, dtype=torch.int64)
    states = type(model).__name__.startswith("CLIP")
    probe = model(input_ids=ids, output_hidden_states=states)
    outputs = [name for name in ("text_embeds", "last_hidden_state", "pooler_output") if probe.get(name) is not None]
    layers = len(probe.hidden_states) if states else 0

    class TextEncoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
            output = self.model(input_ids=input_ids, output_hidden_states=states)
            return (*(output[name] for name in outputs), *(output.hidden_states if states else ()))

    return Traceable(
        module=TextEncoder().eval(),
        inputs=("input_ids",),
        outputs=(*outputs, *(f"hidden_states.{layer}" for layer in range(layers))),
        args=(ids,),
        dynamic_shapes=({0: Dim("batch_size"), 1: Dim("sequence_length")},),
    )


def _denoiser_dims(given: Mapping[str, torch.Tensor], step: int, is_unet: bool) -> dict[str, dict[int, Any]]:
    from torch.export import Dim

    batch, sequence = Dim("batch_size"), Dim("sequence_length")
    if is_unet:
        latents = {"sample": _spatial(step), "timestep": {}}
    else:
        packed = Dim("packed_height_width")
        flat = given["hidden_states"].ndim == 3
        latents = {"hidden_states": {0: batch, 1: packed} if flat else _spatial(step), "timestep": {0: batch}}
        latents |= {"img_ids": {0: packed}, "txt_ids": {0: sequence}}
    rest = {"encoder_hidden_states": {0: batch, 1: sequence}}
    return {key: {**latents, **rest}.get(key, {0: batch}) for key in given}


def _spatial(step: int) -> dict[int, Any]:
    """Axes of a batch of pictures or latents whose sides are multiples of `step`."""
    from torch.export import Dim

    height, width = Dim("height"), Dim("width")
    return {0: Dim("batch_size"), 2: step * height if step > 1 else height, 3: step * width if step > 1 else width}


def _example(name: str, value: torch.Tensor, is_unet: bool) -> torch.Tensor:
    """Of a batch of two, whose axes have sizes of their own: one that is 1, or as large as another, is taken for it."""
    if name == "timestep" and is_unet:
        return value[0]
    if name in ("img_ids", "txt_ids"):
        return value
    value = value.repeat(_BATCH, *(1 for _ in value.shape[1:]))
    if value.ndim == 4:
        value = torch.cat([value, value[..., : value.shape[-1] // 2], value[..., : value.shape[-1]]], dim=-1)
    return value


def _dtype(value: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    """Times of a UNet are whole numbers in some schedulers and not in others: the graph takes any."""
    return dtype if value.is_floating_point() else torch.float32


def _levels(config: Any) -> int:
    return int(2 ** (len(config.block_out_channels) - 1))


def _is_video(model: Any) -> bool:
    return any(isinstance(module, torch.nn.Conv3d) for module in model.modules())


def _refuse(name: str, reason: str) -> UnavailableError:
    return UnavailableError(f"{name} cannot be exported to ONNX: {reason}", remedy=INSTEAD, architecture=name)
