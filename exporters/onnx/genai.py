"""The folder that ONNX Runtime GenAI runs, made by that package's own builder from the merged model.

The package needs `onnxruntime`, which cannot share an environment with `onnxruntime-gpu`: both are the module
`onnxruntime`. So it lives in an environment of its own, and everything of it runs there, as a process. The builder is
never given an adapter: it would leave a DoRA's magnitude out without a word.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dora_serve.errors import OutputError, UnavailableError
from exporters.onnx.export import OnnxExport
from exporters.onnx.options import OnnxOptions
from exporters.onnx.saving import MODEL_FILE
from exporters.onnx.skeleton import GraphFacts

PYTHON_VARIABLE = "DORA_SERVE_GENAI_PYTHON"
_PROGRAM = Path(__file__).with_name("genai_program.py")
_PRECISIONS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_INSTALL = (
    "Make one with `make genai-env` (or: python -m venv genai && genai/bin/pip install 'dora-serve[genai]'), and name "
    f"its Python with --genai-python or ${PYTHON_VARIABLE}."
)


@dataclass(frozen=True)
class GenaiEnvironment:
    """A Python that has onnxruntime-genai, its version, and the architectures that its builder knows."""

    python: str
    version: str
    architectures: frozenset[str]


def genai_environment(python: str | None) -> GenaiEnvironment:
    """Of that Python, else of $DORA_SERVE_GENAI_PYTHON, else this one. Raises UnavailableError where it has none."""
    chosen = python or os.environ.get(PYTHON_VARIABLE) or sys.executable
    if os.sep in chosen:
        # The builder runs in another folder. Not resolved: through its link a Python knows which environment it is of.
        chosen = os.path.abspath(os.path.expanduser(chosen))
    try:
        done = _run(chosen, ["describe"])
    except OSError as error:
        raise UnavailableError(
            f"{chosen!r} cannot be run: {error.strerror}.", remedy=_INSTALL, python=chosen
        ) from error
    if done.returncode != 0:
        raise UnavailableError(
            f"The Python {chosen!r} has no onnxruntime-genai: {_last_line(done.stderr)}.",
            remedy=_INSTALL,
            python=chosen,
        )
    try:
        table = json.loads(done.stdout)
    except json.JSONDecodeError as error:
        raise UnavailableError(
            f"{chosen!r} is no Python: asked for its onnxruntime-genai, it says {done.stdout[:80]!r}.",
            remedy=_INSTALL,
            python=chosen,
        ) from error
    return GenaiEnvironment(chosen, table["version"], frozenset(table["architectures"]))


def require_genai(options: OnnxOptions, architecture: str) -> GenaiEnvironment:
    """Raise UnavailableError for what the builder cannot make, or makes and cannot run."""
    if options.provider == "cpu" and options.dtype != "float32":
        raise UnavailableError(
            f"ONNX Runtime GenAI cannot run {options.dtype} on the CPU: its builder makes the folder, and loading or "
            "generating fails.",
            remedy="Say --onnx-dtype float32 (with --quantize int8 for a smaller one), or --provider cuda.",
            dtype=options.dtype,
            provider=options.provider,
        )
    environment = genai_environment(options.genai_python)
    if architecture not in environment.architectures:
        raise UnavailableError(
            f"The builder of onnxruntime-genai {environment.version} does not know {architecture}; it knows "
            f"{', '.join(sorted(environment.architectures))}.",
            remedy="Leave --runtime out: the plain ONNX route exports it, if any does.",
            architecture=architecture,
        )
    return environment


def export_genai(
    model_folder: Path,
    out_folder: Path,
    options: OnnxOptions,
    architecture: str,
    on_progress: Callable[[str], None] = lambda message: None,
    *,
    fused: bool = True,
) -> OnnxExport:
    """Write the builder's folder: model.onnx and its data, genai_config.json, the tokenizer.

    The graph derives positions from how many ones the attention mask has, so a batch must be padded on the RIGHT; the
    runtime's own generator pads so. fused: whether one product makes queries, keys and values, which leaves no place
    for an adapter of one of them. Raises UnavailableError as `require_genai` does, OutputError where the builder
    fails, with its own words.
    """
    environment = require_genai(options, architecture)
    on_progress(f"building with onnxruntime-genai {environment.version}")
    precision = options.quantize or _PRECISIONS[options.dtype]
    with tempfile.TemporaryDirectory(prefix="dora-export-genai-") as scratch:
        command = ["-m", "onnxruntime_genai.models.builder", "-i", os.path.abspath(model_folder)]
        command += ["-o", os.path.abspath(out_folder)]  # it runs elsewhere
        command += ["-p", precision, "-e", options.provider, "-c", scratch, "--extra_options", "hf_token=false"]
        command += [] if fused else ["fuse_qkv=false"]
        done = subprocess.run(
            [environment.python, *command],
            capture_output=True,
            text=True,
            check=False,
            cwd=scratch,
            env=_offline(),
        )
    graph = out_folder / MODEL_FILE
    if done.returncode != 0 or not graph.is_file():
        raise OutputError(
            f"The builder of onnxruntime-genai {environment.version} failed for {architecture}: "
            f"{_last_line(done.stderr) or _last_line(done.stdout)}.",
            remedy="Leave --runtime out to export without it.",
            command=" ".join([environment.python, *command]),
        )
    facts, opset = _facts(graph)
    files = [path for path in out_folder.iterdir() if path.name.startswith(MODEL_FILE)]
    return OnnxExport(
        folder=out_folder,
        graphs=(facts,),
        opset=opset,
        dtype=options.dtype,
        quantize=options.quantize,
        bytes=sum(path.stat().st_size for path in files),
        traced=True,
        notes=(
            f"Made by onnxruntime-genai {environment.version}. Pad batches on the right: positions come from how many "
            "ones the attention mask has.",
        ),
        runtime="genai",
    )


def generate(
    folder: Path, prompts: Sequence[Sequence[int]], count: int, python: str | None, adapter: Path | None = None
) -> list[list[int]]:
    """Greedy tokens that onnxruntime-genai itself continues each prompt with, an end token being like any other.

    adapter: a file that it swaps in. Raises UnavailableError where it cannot run the folder.
    """
    environment = genai_environment(python)
    asked = json.dumps(
        {
            "folder": str(folder),
            "prompts": [list(prompt) for prompt in prompts],
            "count": count,
            "adapter": None if adapter is None else str(adapter),
        }
    )
    done = _run(environment.python, ["generate"], asked)
    if done.returncode != 0:
        raise UnavailableError(
            f"onnxruntime-genai {environment.version} cannot run the folder: {_last_line(done.stderr)}.",
            remedy="Leave --runtime out to export without it.",
        )
    tokens: list[list[int]] = json.loads(done.stdout)
    return tokens


def _run(python: str, arguments: Sequence[str], given: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, "-P", str(_PROGRAM), *arguments],
        input=given,
        capture_output=True,
        text=True,
        check=False,
        env=_offline(),
    )


def _offline() -> Mapping[str, str]:
    """Everything is local: nothing is to be asked of a hub."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": ""}


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else "no reason given"


def _facts(graph: Path) -> tuple[GraphFacts, int]:
    import onnx

    model = onnx.load(graph, load_external_data=False)
    inputs = tuple(value.name for value in model.graph.input)
    outputs = tuple(value.name for value in model.graph.output)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    return GraphFacts(MODEL_FILE, len(model.graph.node), inputs, outputs), opset


def copy_missing(source: Path, target: Path, names: Sequence[Path]) -> None:
    """Side files of the model that the builder did not write itself."""
    for relative in names:
        if not (target / relative).exists():
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / relative, target / relative)
