"""Prompt sets: the built-in one, and JSONL files of the same schema."""

import dataclasses
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from specjax.errors import SpecJAXError

BUILT_IN = "built_in"

SETS = {
    BUILT_IN: ("specjax.evaluate", "prompts/built_in.jsonl"),
    "spec_bench_odd": ("specjax.evaluate", "prompts/spec_bench_odd.jsonl"),
    "mt_bench_odd": ("specjax.evaluate", "prompts/mt_bench_odd.jsonl"),
    "humaneval_first80": ("specjax.evaluate", "prompts/humaneval_first80.jsonl"),
    "gsm8k_test_100": ("specjax.evaluate", "prompts/gsm8k_test_100.jsonl"),
    "built_in_training": ("specjax.train", "prompts/training.jsonl"),
}
"""Prompts that come with SpecJAX: to evaluate on, and to train on. The last have nothing in common with the others."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        id: unique in its set.
        category: kind of task.
        turns: the user's.
    """

    id: str
    category: str
    turns: tuple[str, ...]

    @property
    def text(self) -> str:
        """The first turn."""
        return self.turns[0]


def load_prompts(name_or_path: str, num_prompts: int = 0, categories: Sequence[str] = ()) -> list[Prompt]:
    """A set that comes with SpecJAX, or a file of {"id", "category", "turns": [text, ...]} lines.

    Args:
        num_prompts: only the first so many, of the categories asked for; 0 takes all.
        categories: only prompts of these; none takes all.

    Raises:
        SpecJAXError: no such file or category, or a line that isn't such an object; names the line.
    """
    if num_prompts < 0:
        raise SpecJAXError(f"num_prompts={num_prompts}: expected 0 (all) or a positive number.")
    if name_or_path in SETS:
        package, name = SETS[name_or_path]
        text = resources.files(package).joinpath(name).read_text(encoding="utf-8")
    else:
        path = Path(name_or_path)
        if not path.is_file():
            raise SpecJAXError(
                f"prompts={name_or_path!r}: is no file; expected one of {tuple(SETS)} or the path of a JSONL file."
            )
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise SpecJAXError(
                f"prompts={name_or_path!r}: is not UTF-8 text ({error}); expected a JSONL file."
            ) from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    prompts = [_parse(f"{name_or_path}:{number}", line) for number, line in lines]
    if not prompts:
        raise SpecJAXError(f"prompts={name_or_path!r}: holds no prompts; expected at least one line.")
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise SpecJAXError(f"prompts={name_or_path!r}: id {prompt.id!r} occurs twice; expected unique ids.")
        seen.add(prompt.id)
    if categories:
        known = dict.fromkeys(prompt.category for prompt in prompts)
        for category in categories:
            if category not in known:
                raise SpecJAXError(
                    f"categories: {category!r} is not in prompts={name_or_path!r}; expected some of {', '.join(known)}."
                )
        prompts = [prompt for prompt in prompts if prompt.category in categories]
    return prompts[:num_prompts] if num_prompts else prompts


def _parse(where: str, line: str) -> Prompt:
    expected = 'expected {"id": str, "category": str, "turns": [str, ...]}'
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise SpecJAXError(f"{where}: is not JSON ({error}); {expected}.") from error
    turns = record.get("turns") if isinstance(record, dict) else None
    texts = isinstance(turns, list) and all(isinstance(turn, str) and turn for turn in turns)
    if not texts or not turns or "id" not in record:
        raise SpecJAXError(f"{where}: {line[:80]!r}; {expected}.")
    return Prompt(str(record["id"]), str(record.get("category", "")), tuple(turns))
