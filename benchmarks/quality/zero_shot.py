"""Zero-shot accuracy by lm-eval on multiple-choice questions in local files, for quality rows.

Prompts are those of lm-eval's own piqa, openbookqa and boolq (SuperGLUE) tasks; the data is given
as JSON lines, so that no network is needed.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from maskprune.commands.evaluate import run_tasks

QUESTIONS: dict[str, dict[str, Any]] = {
    "piqa": {"doc_to_text": "Question: {{question}}\nAnswer:", "doc_to_choice": "{{choices}}"},
    "openbookqa": {"doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}"},
    "boolq": {
        "doc_to_text": "{{passage}}\nQuestion: {{question}}?\nAnswer:",
        "doc_to_choice": ["no", "yes"],
    },
}
# The number that papers report of each: openbookqa's choices differ much in length.
REPORTED = {"piqa": "acc", "openbookqa": "acc_norm", "boolq": "acc"}


def accuracies(
    model: Any, tokenizer: Any, folder: Path, limit: int | None = None
) -> dict[str, float | int]:
    """The accuracy and the number of questions of each task, as fields of a row.

    Args:
        folder: holds piqa.jsonl, openbookqa.jsonl and boolq.jsonl, or some of them; a line has
            `question`, `label` (index of the right choice), and `choices` or `passage`.
        limit: the first questions of each file only.

    Raises:
        ValueError: the folder holds none of the files.
    """
    files = {name: Path(folder, f"{name}.jsonl").absolute() for name in QUESTIONS}
    found = {name: file for name, file in files.items() if file.is_file()}
    if not found:
        raise ValueError(
            f"{folder} holds none of {', '.join(file.name for file in files.values())}"
        )
    with tempfile.TemporaryDirectory() as made:
        for name, file in found.items():
            task = {
                "task": f"local_{name}",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"validation": str(file)}, "cache_dir": made},
                "validation_split": "validation",
                "output_type": "multiple_choice",
                "doc_to_target": "label",
                "metric_list": [{"metric": metric} for metric in ("acc", "acc_norm")],
                **QUESTIONS[name],
            }
            # JSON is YAML.
            lines = [f"{key}: {json.dumps(value)}" for key, value in task.items()]
            Path(made, f"{name}.yaml").write_text("\n".join(lines) + "\n")
        results = run_tasks(model, tokenizer, [made], limit=limit, batch_size=8)
    row: dict[str, float | int] = {}
    for name in found:
        result = results[f"local_{name}"]
        row[f"acc_{name}"] = round(result[REPORTED[name]], 4)
        row[f"acc_{name}_questions"] = result["samples"]
    return row
