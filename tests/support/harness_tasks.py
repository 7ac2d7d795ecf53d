"""Tasks of the lm-evaluation-harness on local files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

QUESTIONS = [
    {"question": "What holds sixteen tokens", "choices": ["a block", "the river", "one sequence owns it"], "answer": 0},
    {
        "question": "Who crosses the bridge every morning, step by step",
        "choices": ["people", "a", "Paris"],
        "answer": 0,
    },
    {"question": "Capital of France", "choices": ["numbers such as 64", "Paris", "10"], "answer": 1},
    {"question": "Why", "choices": ["2048", "because of the prompt and the whole answer", "x"], "answer": 2},
    {"question": "How does this work", "choices": ["keys", "values", "keys and values"], "answer": 2},
]


def write_tasks(folder: Path) -> Path:
    """Writes a multiple-choice, a generation and a perplexity task over the same questions into ``folder``."""
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    common = (
        "dataset_path: json\ntest_split: test\n"
        f"dataset_kwargs:\n  cache_dir: {folder / 'cache'}\n  data_files:\n    test: {data}\n"
    )
    (folder / "choose.yaml").write_text(
        f"task: tiny_choose\n{common}output_type: multiple_choice\n"
        'doc_to_text: "Question: {{question}}?\\nAnswer:"\ndoc_to_target: answer\ndoc_to_choice: choices\n'
        "metric_list:\n  - metric: acc\n  - metric: acc_norm\n"
    )
    (folder / "write.yaml").write_text(
        f"task: tiny_write\n{common}output_type: generate_until\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: "{{choices[answer]}}"\n'
        'generation_kwargs:\n  until: ["e"]\n  max_gen_toks: 12\n'
        "metric_list:\n  - metric: exact_match\n"
    )
    (folder / "read.yaml").write_text(
        f"task: tiny_read\n{common}output_type: loglikelihood_rolling\n"
        'doc_to_text: ""\ndoc_to_target: "{{question}} {{choices[answer]}}"\n'
        "metric_list:\n  - metric: word_perplexity\n  - metric: bits_per_byte\n"
    )
    return folder


def run_harness(
    model: Any, tasks: Path, names: Sequence[str] = ("tiny_choose", "tiny_write", "tiny_read")
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Runs the harness on ``model``; returns its results and the model's raw answers, by task."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    output = lm_eval.simple_evaluate(
        model=model,
        tasks=list(names),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    answers = {
        name: [s["resps"] for s in sorted(own, key=lambda s: s["doc_id"])] for name, own in output["samples"].items()
    }
    return output["results"], answers


def flat(values: Any) -> list[float]:
    """Collects all numbers of nested lists, with booleans and numbers in text."""
    if isinstance(values, (list, tuple)):
        return [number for value in values for number in flat(value)]
    return (
        [float(values)] if not isinstance(values, str) else [{"True": 1.0, "False": 0.0}.get(values) or float(values)]
    )
