"""Runs tasks of the lm-evaluation-harness on a pair. Needs the extra ``pairs``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

from overfill.errors import InvalidRequest
from overfill.making.evaluate.lm_eval_adapter import PairLM


def run_tasks(
    model: PairLM,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat: bool = False,
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Runs tasks of the harness on a pair.

    Args:
        include_path: Folder with more task files.
        limit: Maximum number of documents per task. None means all.
        num_fewshot: Number of examples before each question. None means the task's own number.
        chat: Put questions into the checkpoint's chat template.

    Returns:
        ``{task: {metric: {"value", "stderr"}}}``; ``stderr`` is None if the harness gives none.

    Raises:
        InvalidRequest: a task does not exist.
    """
    manager = _find_tasks(tasks, include_path)
    output = lm_eval.simple_evaluate(
        model=model,
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
        apply_chat_template=chat,
        log_samples=False,
    )
    return {task: _figures(values) for task, values in output["results"].items()}


def _find_tasks(tasks: Sequence[str], include_path: Path | None) -> TaskManager:
    """Finds the tasks. Searches ``include_path`` first, because reading the harness's own files takes many seconds."""
    if include_path is not None:
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
        if all(task in manager.all_tasks for task in tasks):
            return manager
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise InvalidRequest("tasks", f"the harness has no {', '.join(unknown)}; --include-path adds a folder of tasks")
    return manager


def _figures(values: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Converts the harness's ``{"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": …}``."""
    figures = {}
    for key, value in values.items():
        name, _, filtered = key.partition(",")
        if filtered and not name.endswith("_stderr") and isinstance(value, (int, float)):
            error = values.get(f"{name}_stderr,{filtered}")
            shown = name if filtered == "none" else f"{name} ({filtered})"
            figures[shown] = {"value": float(value), "stderr": error if isinstance(error, float) else None}
    return figures
