"""The class that a model folder is loaded into: one of transformers', or of diffusers' for a pipeline's component."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from dora_serve.checkpoint import ShardedCheckpoint
from dora_serve.quiet import quiet_diffusers
from dora_serve.reference_load import from_tensors

DIFFUSERS_KEY = "_class_name"
"""The key of config.json under which diffusers writes the class."""


@dataclass(frozen=True)
class ModelClass:
    """name: the class's; library: where it comes from."""

    name: str
    library: Literal["transformers", "diffusers"]

    @staticmethod
    def of(folder: Path, *configs: Mapping[str, object]) -> ModelClass:
        """The class that the first of `configs` with a word on it names; `folder` is where that one lies.

        Raises ValueError, with the reason as a sentence, where none names one that its library has.
        """
        for config in configs:
            if isinstance(config.get(DIFFUSERS_KEY), str):
                return _known(str(config[DIFFUSERS_KEY]), "diffusers")
            named = config.get("architectures")
            if isinstance(named, list) and named:
                return _known(str(named[0]), "transformers")
        raise ValueError(f"The config.json of {str(folder)!r} names no architecture.")

    def load(
        self, folder: Path, dtype: torch.dtype, device: str, tensors: ShardedCheckpoint | None = None
    ) -> tuple[Any, list[str]]:
        """The model as its user would load it, in eval mode, and the parameters that the folder lacks.

        tensors: what to fill it with in place of the folder's own, which are codes. Raises whatever the library raises.
        """
        options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
        if self.library == "diffusers":
            with quiet_diffusers():
                variant = _variant(folder)
                model, info = _class_of(self).from_pretrained(folder, torch_dtype=dtype, variant=variant, **options)
                if dtype == torch.float64:
                    model = model.to(dtype)  # some modules stay in float32, whatever is asked for
        elif tensors is not None:
            model, info = from_tensors(_class_of(self), tensors, dtype)
        else:
            model, info = _class_of(self).from_pretrained(folder, dtype=dtype, trust_remote_code=False, **options)
        if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # the grouped product has no float64
        return model.to(device).eval(), sorted(info["missing_keys"])


def _known(name: str, library: Literal["transformers", "diffusers"]) -> ModelClass:
    found = ModelClass(name, library)
    module = _library(library)
    base = module.PreTrainedModel if library == "transformers" else module.ModelMixin
    kind = getattr(module, name, None)
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise ValueError(
            f"{name} is no architecture of {library} {module.__version__}, and code that comes with a model is not run."
        )
    return found


def _class_of(model_class: ModelClass) -> Any:
    return getattr(_library(model_class.library), model_class.name)


def _library(name: str) -> Any:
    if name == "diffusers":
        import diffusers

        return diffusers
    import transformers

    return transformers


def _variant(folder: Path) -> str | None:
    """What stands in the names of weights that have no plain ones beside them: fp16 of x.fp16.safetensors."""
    names = [path.name.removesuffix(".safetensors") for path in folder.glob("*.safetensors")]
    variants = {name.partition(".")[2] for name in names}
    return variants.pop() if len(variants) == 1 and "" not in variants else None
