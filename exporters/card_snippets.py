"""How to use what was published, as code that runs as it is printed (tests/test_card.py runs it)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_TEXT_TASKS: Mapping[str, str] = {
    "text-classification": "That is good news.",
    "token-classification": "Ada Lovelace lived in London.",
    "feature-extraction": "Some text.",
}
_PLAIN_INPUTS = ({"input_ids", "attention_mask"}, {"input_ids", "attention_mask", "token_type_ids"})
_NUMPY_TYPES = '{"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}'


@dataclass(frozen=True)
class Published:
    """What a snippet has to know: where it lies, and what lies there.

    revision: a branch, None for the default one. files: by their path in the repository. config: of config.json.
    pipeline_tag: the Hub's task. base: its Hub id. onnx_inputs: of the graph, empty without one.
    """

    repo_id: str
    revision: str | None
    files: Sequence[str]
    config: Mapping[str, Any]
    pipeline_tag: str | None
    base: str | None = None
    onnx_inputs: Sequence[str] = ()

    @property
    def quoted(self) -> str:
        """The arguments that name it."""
        return f'"{self.repo_id}"' + (f', revision="{self.revision}"' if self.revision else "")

    @property
    def has_tokenizer(self) -> bool:
        return any(name in self.files for name in _TOKENIZERS)

    @property
    def chats(self) -> bool:
        return self.has_tokenizer and "chat_template.jinja" in self.files

    @property
    def graphs(self) -> tuple[str, ...]:
        return tuple(name for name in self.files if name.endswith(".onnx"))

    @property
    def architecture(self) -> str | None:
        named = self.config.get("architectures")
        return str(named[0]) if isinstance(named, list) and named else None


def snippets(published: Published) -> dict[str, str]:
    """Python by the library that it is for; empty where nothing is known that runs."""
    files = published.files
    if "adapter_model.safetensors" in files or "adapters.safetensors" in files:
        # The task of an adapter is not in its files: only where the base's card says it.
        if "adapters.safetensors" in files:
            return {}
        return {"PEFT": _peft(published)} if published.base and published.pipeline_tag == "text-generation" else {}
    if published.graphs:
        return _onnx(published)
    if "config.json" in files and published.architecture:
        found = {"transformers": _transformers(published)}
        if published.pipeline_tag == "text-generation" and published.has_tokenizer:
            found["vLLM"] = _vllm(published)
        return found
    return {}


def _transformers(published: Published) -> str:
    where, task = published.quoted, published.pipeline_tag
    if task == "text-generation" and published.has_tokenizer:
        return f"""from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({where})
model = AutoModelForCausalLM.from_pretrained({where})
{_tokens(published, "pt")}
answer = model.generate(**tokens, max_new_tokens=40)
print(tokenizer.decode(answer[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True))"""
    if task is not None and task in _TEXT_TASKS and published.has_tokenizer:
        return f"""from transformers import pipeline

run = pipeline("{task}", model={where})
print(run("{_TEXT_TASKS[task]}"))"""
    return f"""from transformers import {published.architecture}

model = {published.architecture}.from_pretrained({where})
print(f"{{model.num_parameters():,}} parameters")"""


def _peft(published: Published) -> str:
    return f"""from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained({published.quoted})
print(model.peft_config["default"])"""


def _vllm(published: Published) -> str:
    if published.chats:
        ask = 'answers = llm.chat([{"role": "user", "content": "What is the capital of France?"}], sampling)'
    else:
        ask = 'answers = llm.generate(["The capital of France is"], sampling)'
    return f"""from vllm import LLM, SamplingParams

llm = LLM({published.quoted})
sampling = SamplingParams(temperature=0.0, max_tokens=40)
{ask}
print(answers[0].outputs[0].text)"""


def _onnx(published: Published) -> dict[str, str]:
    """A graph of a causal model is run with its cache, token by token; another one once."""
    # Beside its own copy, not in the cache: ONNX Runtime follows no link from a graph to its weights' file.
    name = published.repo_id.rpartition("/")[2]
    head = """import numpy as np
import onnxruntime
from huggingface_hub import snapshot_download
"""
    fetch = f"""
folder = snapshot_download({published.quoted}, local_dir="{name}")
session = onnxruntime.InferenceSession(f"{{folder}}/{published.graphs[0]}")
"""
    cached = any(name.startswith("past_key_values") for name in published.onnx_inputs)
    others = {name for name in published.onnx_inputs if not name.startswith("past_key_values.")}
    if cached and published.has_tokenizer and others == {"input_ids", "attention_mask", "position_ids"}:
        tokenize = f"""from transformers import AutoTokenizer
{fetch}
tokenizer = AutoTokenizer.from_pretrained(folder)
{_tokens(published, "np")}
ids = np.asarray(tokens["input_ids"], dtype=np.int64)
types = {_NUMPY_TYPES}
cache = {{
    entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), types[entry.type])
    for entry in session.get_inputs()
    if entry.name.startswith("past_key_values.")
}}
names = [output.name for output in session.get_outputs()]
answer: list[int] = []
while len(answer) < 40 and tokenizer.eos_token_id not in answer:
    past = next(iter(cache.values())).shape[2]
    positions = np.arange(past, past + ids.shape[1])[None]
    mask = np.ones((1, past + ids.shape[1]), np.int64)
    given = {{"input_ids": ids, "attention_mask": mask, "position_ids": positions, **cache}}
    got = dict(zip(names, session.run(None, given)))
    cache = {{name: got[name.replace("past_key_values", "present")] for name in cache}}
    answer.append(int(got["logits"][0, -1].argmax()))
    ids = np.array([answer[-1:]])
print(tokenizer.decode(answer, skip_special_tokens=True))"""
        return {"ONNX Runtime": head + tokenize}
    if not cached and published.has_tokenizer and others in _PLAIN_INPUTS:
        tokenize = f"""from transformers import AutoTokenizer
{fetch}
tokenizer = AutoTokenizer.from_pretrained(folder)
tokens = tokenizer("Some text.", return_tensors="np")
tokens = {{"token_type_ids": np.zeros_like(tokens["input_ids"]), **tokens}}
given = {{entry.name: np.asarray(tokens[entry.name], np.int64) for entry in session.get_inputs()}}
for output, value in zip(session.get_outputs(), session.run(None, given)):
    print(output.name, value.shape)"""
        return {"ONNX Runtime": head + tokenize}
    listing = "\nfor entry in session.get_inputs():\n    print(entry.name, entry.type, entry.shape)"
    return {"ONNX Runtime": head.replace("import numpy as np\n", "") + fetch + listing.lstrip("\n")}


def _tokens(published: Published, tensors: str) -> str:
    if published.chats:
        return f"""tokens = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "What is the capital of France?"}}],
    add_generation_prompt=True,
    return_dict=True,
    return_tensors="{tensors}",
)"""
    return f'tokens = tokenizer("The capital of France is", return_tensors="{tensors}")'
