"""What an adapter's files say beyond lora_A and lora_B, and whether norm scales in a file hold for the served base."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dora_serve.errors import AdapterError, CheckpointError
from dora_serve.norm_scale_file import NormScales, fingerprint
from dora_serve.vllm_plugin.norm_scales import Trained

_MAGNITUDE = re.compile(r"^(.+)\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?$")
_PREFIX = "base_model.model."


def split_magnitudes(
    tensors: Mapping[str, Tensor], use_dora: bool, weights_mapper: Any
) -> tuple[dict[str, Tensor], Trained | None]:
    """An adapter's tensors by name -> those that vLLM knows, and the magnitudes by vLLM's names of their modules.

    Raises AdapterError where the configuration and the tensors disagree on whether this is a DoRA.
    """
    from vllm.lora.utils import parse_fine_tuned_lora_name

    factors, magnitudes, names = {}, {}, {}
    for name, tensor in tensors.items():
        match = _MAGNITUDE.match(name)
        if match is None:
            factors[name] = tensor
            continue
        module, _ = parse_fine_tuned_lora_name(f"{match[1]}.lora_A.weight", weights_mapper)
        magnitudes[module], names[module] = tensor, match[1].removeprefix(_PREFIX)
    if use_dora and not magnitudes:
        raise AdapterError(
            "The adapter's configuration says use_dora, and its file has no magnitude.",
            remedy="Save it again with its trainer: without them it is another adapter.",
        )
    if magnitudes and not use_dora:
        raise AdapterError(
            f"The adapter has {len(magnitudes)} magnitudes, and its configuration does not say use_dora.",
            remedy='Set "use_dora": true in adapter_config.json if it was trained as a DoRA.',
        )
    return factors, Trained(magnitudes, names) if magnitudes else None


class ServedBase:
    """The base of a server: what its layers' norms are, and which files it was read from.

    squares: `||w_i||^2` of layers by name, filled as they are needed.
    """

    def __init__(self, vllm_config: Any) -> None:
        self.squares: dict[str, Tensor] = {}
        self._model, self._revision = vllm_config.model_config.model, vllm_config.model_config.revision
        self._is_from_files = vllm_config.load_config.load_format in ("auto", "hf", "safetensors")
        self._fingerprint: str | None = None

    def weights_were_replaced(self) -> None:
        """From here on the base is not what its files say."""
        self.squares.clear()
        self._is_from_files = False

    def with_known_scales(self, trained: Trained, stored: NormScales | None) -> Trained:
        """`trained` with the norm scales from its file, where that was made for this base."""
        if stored is None or stored.base != self._own_fingerprint():
            return trained
        return replace(trained, precomputed=stored.scales)

    def _own_fingerprint(self) -> str | None:
        if not self._is_from_files:
            return None
        if self._fingerprint is None:
            folder = _local_folder(self._model, self._revision)
            try:
                self._fingerprint = None if folder is None else fingerprint(folder)
            except CheckpointError:  # in another format
                self._is_from_files = False
        return self._fingerprint


def _local_folder(model: str, revision: str | None) -> Path | None:
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (OSError, ValueError):
        return None
