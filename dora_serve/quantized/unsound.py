"""What is said of codes that are incomplete or inconsistent, whatever the layout."""

from __future__ import annotations

from dora_serve.errors import CheckpointError
from dora_serve.safetensors_file import TensorEntry

FETCH_AGAIN = "Fetch or save the base again."
WAY_OUT = (
    "Merge into the original weights (--base ORIGINAL --merge-into original), or dequantize it with the library that "
    "wrote it, save that, and give it as the base."
)


def unsound(
    kind: str, module: str, entry: TensorEntry, got: str, wanted: str, *, remedy: str = FETCH_AGAIN
) -> CheckpointError:
    """kind: of what the module was to be, such as "HQQ layer". entry: a tensor of it, in whose file it is."""
    return CheckpointError(
        f"{module} in {str(entry.path)!r} is no sound {kind}: got {got}, wanted {wanted}.",
        remedy=remedy,
        path=str(entry.path),
        module=module,
    )
