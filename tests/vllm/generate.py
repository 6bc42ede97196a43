"""A program of its own, since an engine of vLLM's keeps its process: a job on stdin, the answer into a file.

Job: model, engine (arguments of vllm.LLM), adapters (name -> path), batches: lists of {prompt, adapter, tokens}, prompt
being text or token ids; or one {adapter, path}, to be loaded in place of that adapter. Answer: for each batch a list of
{"tokens": [...], "logprobs": [...]}, or {"error": text}. With "compiled": true the model is compiled, adapters and all.
With "classify": true the model is a classifier, and the answer has the probabilities of its classes for each request.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

# Before vllm is imported. One core each: the processes of a parallel engine share the machine with other tests.
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def main() -> None:
    job = json.loads(sys.stdin.read())
    os.environ.update(SETTINGS, VLLM_ENABLE_V1_MULTIPROCESSING="0")  # each process imports all of vLLM
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 32, "enable_prefix_caching": False}
    engine["enforce_eager"] = True  # without adapters vLLM compiles the model, which takes longer than all else
    if job["adapters"]:
        engine |= {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
    if job.get("classify"):
        engine |= {"runner": "pooling", "convert": "classify"}
    if job.get("compiled"):
        from tests.vllm.compiled_lora import compile_on_cpus

        compile_on_cpus()
    llm = LLM(job["model"], **(engine | job["engine"]))
    loras = {
        name: LoRARequest(name, number, path) for number, (name, path) in enumerate(job["adapters"].items(), start=1)
    }
    if job.get("classify"):
        answer = [_probabilities(llm, batch, loras) for batch in job["batches"]]
    else:
        answer = [_run(llm, batch, loras, SamplingParams) for batch in job["batches"]]
    if job.get("compiled"):
        from vllm.compilation.counter import compilation_counter

        assert compilation_counter.num_piecewise_graphs_seen > 1
    Path(sys.argv[1]).write_text(json.dumps(answer))  # vLLM talks on stdout


def _probabilities(llm: Any, batch: list[dict[str, Any]], loras: dict[str, Any]) -> list[list[float]]:
    outputs = llm.classify(
        [{"prompt_token_ids": one["prompt"]} for one in batch],
        lora_request=[loras[one["adapter"]] if one["adapter"] else None for one in batch],
        use_tqdm=False,
    )
    return [output.outputs.probs for output in outputs]


def _run(llm: Any, batch: Any, loras: dict[str, Any], params: Any) -> Any:
    try:
        return _swap(llm, batch, loras) if isinstance(batch, dict) else _answers(llm, batch, loras, params)
    except Exception as error:
        return {"error": str(error)}


def _swap(llm: Any, swap: dict[str, str], loras: dict[str, Any]) -> list[Any]:
    was = loras[swap["adapter"]]
    llm.llm_engine.add_lora(type(was)(was.lora_name, was.lora_int_id, swap["path"], load_inplace=True))
    return []


def _answers(llm: Any, batch: list[dict[str, Any]], loras: dict[str, Any], params: Any) -> list[Any]:
    prompts = [
        one["prompt"] if isinstance(one["prompt"], str) else {"prompt_token_ids": one["prompt"]} for one in batch
    ]
    sampling = [params(temperature=0, max_tokens=one["tokens"], ignore_eos=True, logprobs=0) for one in batch]
    requests = [loras[one["adapter"]] if one["adapter"] else None for one in batch]
    outputs = llm.generate(prompts, sampling, lora_request=requests if loras else None, use_tqdm=False)
    return [
        {
            "tokens": list(output.outputs[0].token_ids),
            "logprobs": [
                step[token].logprob
                for token, step in zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True)
            ],
        }
        for output in outputs
    ]


if __name__ == "__main__":
    main()
