"""What is to be measured of a project's tasks: which rows, or which text in their place, at which channels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from .adapter import Adapter
from .dataset import Example, check_fit, load_rows
from .errors import AdapterError, DataError, UsageError
from .geometry import Geometry
from .loading import load_config, load_tokenizer
from .measure import CHUNK, find_layers, measure, open_base, open_trained, text_examples
from .moments import Moments
from .names import check_name
from .probe import probe
from .project import Project
from .recipe import Recipe, load, names
from .registry import Registry
from .registry.measured import block_channels
from .registry.replay import digests
from .shares import check_claims
from .stream import fingerprint
from .train import TEMPLATE, changed_since
from .view import Kind

Say = Callable[[str], None]
FEW = 16  # rows below which moments say little


@dataclass(frozen=True, slots=True)
class Subject:
    """One task to be measured.

    Attributes:
        source: whether the examples are its own or a text's.
        channels: module -> input channels of its block, see `registry.measured.block_channels`.
        quantization: how the base is quantised while the task trains, and is measured.
        adapter: of the task, which its rows go through; None: through the base alone.
    """

    task: str
    examples: list[Example] = field(repr=False)
    source: Literal["task", "text"]
    channels: dict[str, list[int]] = field(repr=False)
    quantization: Kind | None = None
    adapter: Adapter | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Survey:
    """Tasks to be measured on one base model.

    Attributes:
        geometry: of the base, its modules called as the registry calls them.
        subjects: in the order asked for.
    """

    base: Path
    geometry: Geometry
    subjects: tuple[Subject, ...]

    @classmethod
    def of(
        cls,
        project: Project,
        registry: Registry | None,
        tasks: Sequence[str],
        *,
        rows: int,
        text: Path | None,
        say: Say,
        overrides: Sequence[str] = (),
        trained: bool = False,
    ) -> Survey:
        """Find everything that can be found without the model.

        Args:
            registry: whose claims say at which channels; None where nothing was ever allocated.
            rows: how many of each task at most.
            text: a file that stands for the rows of tasks that have none.
            overrides: of the tasks' recipes, see `recipe.load`.
            trained: through each task's own adapter.

        Raises:
            UsageError: no task, no rows, or a task without a recipe and no text; or a text for trained tasks.
            AdapterError: a trained task has no adapter, or one of another task, base or claims.
            DataError: a task's rows are missing or do not fit its recipe or the model, or the text cannot be read.
        """
        if rows < 1:
            raise UsageError(f"{rows} rows are none: measure one at least")
        if not tasks:
            raise UsageError("no task to measure: name some with --tasks")
        if trained and text is not None:
            raise UsageError("--text stands for rows before training, and --trained is of rows after it: take one")
        base = project.base(say)
        geometry = project.base_geometry(base)
        config, tokenizer = load_config(base), load_tokenizer(base)
        subjects = []
        for task in dict.fromkeys(tasks):
            recipe = _recipe(project, check_name(task), text, overrides)
            examples, source, quantization = _examples(recipe, task, config, tokenizer, rows, text, say)
            if len(examples) < min(rows, FEW):
                say(f"task {task} has {len(examples)} rows to measure, few to tell it from others by: {FEW} or more do")
            adapter = _adapter(project, registry, task) if trained else None
            if adapter is not None and recipe is not None and (odd := changed_since(adapter.path, recipe, TEMPLATE)):
                say(
                    f"task {task} was trained with another {' and '.join(odd)} than its recipe has now: what is "
                    "measured is of rows that its adapter does not know in these words"
                )
            subjects.append(Subject(task, examples, source, {}, quantization, adapter))
        if text is not None and all(subject.source == "task" for subject in subjects):
            say(f"{text} is not used: all of these tasks have rows of their own")
        if registry is not None:
            with registry.reading() as reader:
                geometry = reader.named(geometry)
                subjects = [
                    replace(subject, channels=block_channels(reader, geometry.model, subject.task))
                    for subject in subjects
                ]
        return cls(base, geometry, tuple(subjects))

    def to_json(self) -> dict[str, dict[str, Any]]:
        """What measuring will come to, by task. Experts are no linear layers, and not among the matrices."""
        return {
            subject.task: {
                "rows": len(subject.examples),
                "tokens": sum(len(example.input_ids) for example in subject.examples),
                "source": subject.source if subject.adapter is None else "adapter",
                "matrices": sum(not matrix.is_expert for matrix in self.geometry.matrices),
                "channels": sum(map(len, subject.channels.values())),
            }
            for subject in self.subjects
        }

    def measure(self, say: Say) -> Iterator[Moments]:
        """Moments of one task after the other. The model is loaded once for all that train on it in the same way.

        Raises:
            CheckpointError: the base cannot be loaded.
            DataError: the base gives values that are not finite.
        """
        base_fingerprint = fingerprint(self.base, self.geometry)
        model: Any = None
        loaded: Kind | None = None
        lacking: set[str] = set()
        for subject in self.subjects:
            if model is None or subject.adapter is not None or subject.quantization != loaded:
                model = None  # before the next one takes its room
                if subject.adapter is None:
                    model, loaded = open_base(self.base, subject.quantization, say), subject.quantization
                else:
                    model = open_trained(self.base, subject.adapter, say)
                live = find_layers(model, self.geometry)
                lacking = {matrix.module for matrix in self.geometry.matrices} - live.keys()
            if lost := sorted(subject.channels.keys() & lacking):
                say(f"{len(lost)} claimed matrices are no linear layers of the live model, {lost[0]} first: left out")
            yield measure(
                model,
                subject.examples,
                subject.task,
                geometry=self.geometry,
                base_fingerprint=base_fingerprint,
                channels=subject.channels,
                source=subject.source,
                adapter=None if subject.adapter is None else subject.adapter.digest,
            )


def _adapter(project: Project, registry: Registry | None, task: str) -> Adapter:
    """A task's trained adapter.

    Raises:
        AdapterError: there is none, or it is damaged or of another task or of other claims.
    """
    folder = project.adapter(task)
    if not folder.is_dir():
        raise AdapterError(f"{folder} does not exist: `multisbora train --task {task}` first, or leave --trained out")
    found = Adapter.read(folder)
    if found.task != task:
        raise AdapterError(f"{folder} holds the adapter of task {found.task}: put that of task {task} in its place")
    if registry is not None:
        with registry.reading() as reader:
            check_claims([found], {task: digests(reader, project.model_name, task)})
    return found


def _recipe(project: Project, task: str, text: Path | None, overrides: Sequence[str]) -> Recipe | None:
    """A task's recipe; None where it has none and needs none, since there is a text."""
    if text is not None and task not in names(Path(project.recipes)):
        return None
    return load(task, Path(project.recipes), overrides)


def _examples(
    recipe: Recipe | None, task: str, config: Any, tokenizer: Any, rows: int, text: Path | None, say: Say
) -> tuple[list[Example], Literal["task", "text"], Kind | None]:
    """A task's examples, whether they are its own, and how its recipe quantises the base."""
    quantization = None if recipe is None else recipe.training.quantization
    lacks = "it has no recipe" if recipe is None else "" if text is None else _lacks_rows(recipe)
    if text is not None and lacks:
        say(f"{text} stands for the rows of task {task}: {lacks}")
        known = getattr(config.get_text_config(), "max_position_embeddings", None) or CHUNK
        return text_examples(text, tokenizer, rows, known), "text", quantization
    assert recipe is not None
    examples = probe(recipe, tokenizer, rows, say)
    remedy, loss = "lower training.cutoff to {known}", "what is measured beyond that says little"
    check_fit(config, examples, f"task {task}", remedy, loss, say)
    return examples, "task", quantization


def _lacks_rows(recipe: Recipe) -> str:
    """Why a recipe's training rows cannot be had; "" where they can."""
    try:
        load_rows(recipe.train)
    except DataError as error:
        return str(error)
    return ""
