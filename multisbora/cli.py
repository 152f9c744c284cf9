"""The command line: arguments in, exit codes out. What a command does lies in the module it calls."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from .cli_composed import crosstalk, tune
from .cli_merged import add, apply, diff, merge, remove, reweight, verify
from .cli_registry import registry_app
from .cli_train import measure, train
from .distributed import first_to_fail
from .errors import MultisboraError, UsageError
from .terminal import (
    BaseView,
    Composition,
    DryRun,
    Json,
    Model,
    Output,
    Rank,
    Set,
    Targets,
    Task,
    Tasks,
    VariantOption,
    say,
    show,
    split,
    split_targets,
    table,
)

app = typer.Typer(
    help="Train many tasks apart, each in its own region of one base model, and merge any of them exactly.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(registry_app, name="registry")


@app.command()
def init(
    model: Annotated[str, typer.Option("--model", help="Base model: a hub id or a folder.")],
    variant: VariantOption = None,
    rank: Rank = None,
    targets: Targets = None,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Make a project in this folder: write multisbora.yaml."""
    from .commands import new_project

    project = new_project(model, variant=variant, rank=rank, targets=split_targets(targets))
    if project.model != model:
        say(f"{model} is a geometry card, for planning and allocation alone: the project's model is {project.model}")
    if dry_run:
        show(project.model_dump(mode="json"), as_json, project.text().splitlines())
    else:
        path = project.write()
        show(
            project.model_dump(mode="json"),
            as_json,
            [f"wrote {path}: next, `multisbora measure --tasks ...`, or `allocate` at once"],
        )


@app.command()
def models(as_json: Json = False) -> None:
    """List the geometry cards: base models that can be planned and allocated without fetching them."""
    from .cards import card_names, read_card
    from .geometry import describe

    cards = {name: describe(read_card(name)) for name in card_names()}
    rows: list[tuple[object, ...]] = [("card", "type", "layers", "hidden", "parameters", "matrices", "kinds", "hub id")]
    for name, card in cards.items():
        others = len(card["names"]) - 1
        rows.append(
            (
                name,
                card["model_type"],
                card["layers"],
                card["hidden_size"],
                f"{card['parameters'] / 1e9:7.2f} B",
                card["matrices"],
                " ".join(card["kinds"]),
                card["names"][0] + (f" and {others} more" if others else ""),
            )
        )
    show(cards, as_json, table(rows))


@app.command()
def plan(
    model: Model = None,
    tasks: Tasks = None,
    variant: VariantOption = None,
    rank: Rank = None,
    targets: Targets = None,
    composition: Composition = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="Rows of a micro-batch: predict the peak memory.")
    ] = None,
    length: Annotated[int | None, typer.Option("--length", min=2, help="Tokens of each of these rows.")] = None,
    as_json: Json = False,
) -> None:
    """Say what tasks would cost and how many more fit. Writes nothing; with --model it needs no project."""
    from .commands import plan_tasks, quiet_libraries
    from .project import Project

    project = Project.load_or_default(model=model, variant=variant, rank=rank, composition=composition)
    if batch_size is not None:
        quiet_libraries()
    found = plan_tasks(project, split(tasks) or [], split_targets(targets), batch_size, length, say)
    show(found.to_json(), as_json, found.lines())
    if found.refusal is not None:
        raise found.refusal


@app.command()
def allocate(
    tasks: Tasks = None,
    variant: VariantOption = None,
    rank: Rank = None,
    targets: Targets = None,
    composition: Composition = None,
    compositions: Annotated[
        Path | None,
        typer.Option("--compositions", help="YAML file of several compositions, a line `name: [task, task]` each."),
    ] = None,
    reallocate: Annotated[
        bool,
        typer.Option("--reallocate", help="Give tasks that are not trained other indices where they are in the way."),
    ] = False,
    strategy: Annotated[
        str | None,
        typer.Option(
            "--strategy",
            help="isolated: channels that suit a task's rows and not the others'; random; or auto, which is isolated "
            "where all were measured, and the default.",
        ),
    ] = None,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Give each task its own region of every target matrix. Again gives the same; all tasks or none."""
    from .allocating import allocate_tasks, read_compositions
    from .commands import quiet_libraries
    from .project import Project

    if tasks is None and compositions is None:
        raise UsageError("name the tasks with --tasks, or tasks and compositions in a file with --compositions")
    if tasks is not None and compositions is not None:
        raise UsageError("--tasks names tasks and --compositions a file that names its own: give one of them")
    if composition is not None and compositions is not None:
        raise UsageError("--composition names one composition and --compositions a file of several: give one of them")

    project = Project.load(variant=variant, rank=rank, composition=composition, strategy=strategy)
    several = read_compositions(compositions) if compositions is not None else None
    found = allocate_tasks(
        project,
        split(tasks) or [],
        several,
        split_targets(targets),
        reallocate,
        dry_run=dry_run,
        say=say,
        quiet=quiet_libraries,
    )
    rows = [("task", "variant", "rank", "matrices", "indices")]
    rows += [
        (name, c.variant, c.rank, len(c.regions), sum(r.rank for r in c.regions.values()))  # type: ignore[misc]
        for name, c in found.tasks.items()
    ]
    rooms = [f"{name}: {room.line}" for name, room in found.compositions.items()]
    moved = [f"given other indices: {', '.join(found.moved)}"] if found.moved else []
    show(found.to_json(), as_json, [*table(rows), "", *moved, *rooms])


@app.command()
def status(composition: Composition = None, as_json: Json = False) -> None:
    """Say who owns what, what is trained, and what is free."""
    from . import lifecycle
    from .project import Project

    found = lifecycle.status(Project.load(composition=composition))
    rows = [("task", "variant", "rank", "matrices", "rows measured", "stage", "adapter here")]
    keys = ("variant", "rank", "matrices", "measured", "stage", "adapter")
    rows += [(task, *(state[key] for key in keys)) for task, state in found["tasks"].items()]
    others: list[tuple[object, ...]] = [("composition", "tasks", "more that fit")]
    others += [(name, len(c["tasks"]), c["line"]) for name, c in found["compositions"].items()]
    axes = [("kind", "axis", "size", "claimed", "free")]
    axes += [(f["kind"], f["axis"], f["size"], f["claimed"], f["free"]) for f in found["free"]]
    heading = f"{found['model']}, composition {found['composition']}"
    nothing = ["no task holds claims: `multisbora allocate --tasks ...`"]
    shown = [heading, "", *(table(rows) if found["tasks"] else nothing), "", *table(axes)]
    if found["to_come"]:
        coming = ", ".join(f"{task} ({rows} rows)" for task, rows in found["to_come"].items())
        shown += ["", f"measured, and no claims yet: {coming}; isolated indices are left for tasks that may come,"]
        shown += ["until `multisbora registry forget --task TASK`"]
    show(found, as_json, [*shown, *(["", *table(others)] if found["compositions"] else [])])


@app.command()
def release(
    task: Task,
    composition: Composition = None,
    force: Annotated[
        bool, typer.Option("--force", help="Also if a merged checkpoint here depends on it, or it is being trained.")
    ] = False,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Give a task's claims back. Its adapter and the registry's history stay."""
    from . import lifecycle
    from .project import Project

    project = Project.load(composition=composition)
    lifecycle.release(project, task, force=force, dry_run=dry_run)
    verb = "would give back" if dry_run else "gave back"
    result = {"task": task, "composition": project.composition}
    show(result, as_json, [f"{verb} the claims of {task} in composition {project.composition}"])


app.command()(measure)
app.command()(train)


for command in (crosstalk, tune, merge, verify, add, remove, reweight, diff, apply):
    app.command()(command)


@app.command("eval")
def evaluate(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="A base model, a merged checkpoint or an adapter folder.")
    ],
    tasks: Annotated[str, typer.Option("--tasks", help="Task names, separated by commas.")],
    method: Annotated[str, typer.Option("--method", help="generate, or choice (likelihood of options).")] = "generate",
    limit: Annotated[int | None, typer.Option("--limit", help="Rows a task, the same for every model.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Prompts generated at a time.")] = 16,
    num_beams: Annotated[int | None, typer.Option("--num-beams", help="Beams, if not the recipe's.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", help="Tokens to generate, if not the recipe's.")
    ] = None,
    base_view: BaseView = None,
    quantization: Annotated[
        str | None,
        typer.Option(
            "--quantization",
            help="Quantise the base, nf4 or int8: PATH itself, or that of an adapter trained on the stored one.",
        ),
    ] = None,
    set_: Set = None,
    record: Annotated[
        bool, typer.Option("--record", help="Write the scores into the receipt of the merged checkpoint PATH.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print every prompt and answer to stderr.")] = False,
    as_json: Json = False,
) -> None:
    """Score a base model, an adapter or a merged checkpoint on tasks: answers, and NLL of the right ones."""
    from .commands import evaluate_path, quiet_libraries

    found = evaluate_path(
        path,
        split(tasks) or [],
        set_ or [],
        record,
        quiet=quiet_libraries,
        say=say,
        base_view=base_view,
        quantization=quantization,
        method=method,
        limit=limit,
        batch_size=batch_size,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        verbose=verbose,
    ).to_json()
    rows: list[tuple[object, ...]] = [("task", "subset", "n", "score", "nll")]
    for task, scores in found["tasks"].items():
        rows += [(task, s, v["n"], *map(_figure, (v["score"], v["nll"]))) for s, v in scores["subsets"].items()]
        rows += [(task, "all", scores["n"], *map(_figure, (scores["score"], scores["nll"])))]
    show(found, as_json, table(rows))


@app.command()
def export(
    task: Task,
    output: Output,
    format: Annotated[str, typer.Option("--format", help="peft-lora: a plain LoRA for stock PEFT, vLLM and others.")],
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Write a task's adapter in the format of another tool."""
    from .commands import export_task
    from .project import Project

    export_task(Project.load(), task, format, output, dry_run=dry_run, say=say)
    result = {"task": task, "format": format, "output": str(output)}
    show(result, as_json, [f"would write {output}" if dry_run else f"wrote {output}"])


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", help="Folder to make.")] = Path("multisbora-demo"),
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """The whole of it on a small model: two tasks trained apart, merged, proven, scored. Takes some minutes."""
    from .demo.run import check_folder, run_demo

    if dry_run:
        check_folder(output)
        show({"folder": str(output)}, as_json, [f"would make a project in {output} and run the commands of the README"])
        return
    found = run_demo(output, say=say)
    show(found.to_json(), as_json, found.lines())


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def main() -> NoReturn:
    """Run the command line. Errors that have a reason end in one line on stderr and the exit code of their kind."""
    # The hub's library warns of each of its retries; it reads this when it is imported, which is later, if at all.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    # Importing PEFT imports bitsandbytes, which warns of a kernel for CPUs that it could fetch from the hub.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        app(prog_name="multisbora")
    except (MultisboraError, OSError) as error:
        if first_to_fail():
            print(f"multisbora: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code if isinstance(error, MultisboraError) else MultisboraError.exit_code)
    sys.exit(0)
