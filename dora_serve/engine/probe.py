"""Whether an adapter changes anything: each of its layers is given a fixed input, with the adapter and without.

That is a thousandth of the work of a forward, and what the base makes of the inputs is computed once for all adapters.
A layer that no forward of the model ever reaches does not count, whatever its adapter does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dora_serve.engine.base_layers import lookup, without_bias
from dora_serve.engine.factors import Factors, PreparedAdapter
from dora_serve.ops import adapted_linear

_IDS = 16
_ROUNDING = 8 * torch.finfo(torch.float32).eps
"""Of a DoRA that was never trained the norm scale is 1 but for a spacing or two."""


@dataclass
class Probe:
    """layers: of the base, by name. find_reached: the names of those that a forward of the model runs."""

    layers: Mapping[str, nn.Module]
    find_reached: Callable[[], frozenset[str]]
    _reached: frozenset[str] | None = None
    _known: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def changes(self, adapter: PreparedAdapter) -> bool:
        """Whether any layer's output differs by more than the rounding of a norm, which is that of float32."""
        if self._reached is None:
            self._reached = self.find_reached()
        return any(self._layer_changes(name, adapter.modules[name]) for name in self._reached & adapter.modules.keys())

    def _layer_changes(self, name: str, factors: Factors) -> bool:
        layer = self.layers[name]
        x, base = self._of(name)
        base, lora_a = base.to(factors.lora_B.dtype), factors.lora_A
        found = lookup(layer, lora_a.T)(x) if isinstance(layer, nn.Embedding) else None
        adapted = adapted_linear(
            base,
            x if found is None else found,
            lora_a if found is None else None,
            factors.lora_B,
            norm_scale=factors.norm_scale,
            bias=factors.bias,
        )
        return bool(((adapted - base).abs() > _ROUNDING * base.abs()).any())

    def _of(self, name: str) -> tuple[Tensor, Tensor]:
        """The input that a layer is given, and the base's output for it."""
        if name not in self._known:
            layer = self.layers[name]
            weight = next(layer.parameters())
            if isinstance(layer, nn.Embedding):
                x = torch.linspace(0, layer.num_embeddings - 1, _IDS, device=weight.device).long()[None]
            else:
                generator = torch.Generator().manual_seed(0)
                width = layer.in_features if isinstance(layer, nn.Linear) else weight.shape[0]
                dtype = weight.dtype if weight.is_floating_point() else torch.float32
                x = torch.randn((1, 1, int(width)), generator=generator).to(weight.device, dtype)
            with torch.inference_mode():
                self._known[name] = (x, without_bias(layer)(x))
        return self._known[name]
