"""The command line. Exit status 2: the input was wrong; 1: the run failed; 75: it was stopped and can go on."""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from dualhead.commands.catalogue import first_line, kind_of, recipes, shipped
from dualhead.commands.examples import examples_of
from dualhead.errors import Interrupted, RunError, UserError, under
from dualhead.system.memory import keep_freed_blocks
from dualhead.system.told import Once

# What computes is imported by the commands that compute, so that `--help` and a wrong option answer at once.

app = typer.Typer(
    invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Dual Head Adversarial Training: more robust image classifiers, and honest measures of how robust they are.",
)  # fmt: skip

STOPPED = 75  # EX_TEMPFAIL: try again later

# Typer carries its own copy of click, or uses the installed one, by version: the classes are found through its own.
_UsageError, _ClickError = cast("tuple[type[Any], type[Any]]", typer.BadParameter.__mro__[1:3])


def _at_hand(context: typer.Context, address: str | None) -> str | None:
    """Make networks by the function of `--factory` until the command ends."""
    if address is not None and not context.resilient_parsing:
        from dualhead.models import at_hand_by_name

        context.with_resource(at_hand_by_name(address))
    return address


Overrides = Annotated[list[str] | None, typer.Argument(help="KEY=VALUE with dotted keys, e.g. threat.eps=4/255")]
ModelName = Annotated[str, typer.Argument(help="A run, an exported model, a Hub name, or package.module:factory.")]
Recipes = Annotated[
    str,
    typer.Argument(
        help="Name of a shipped recipe (`dualhead list recipes`), or a YAML file.",
        autocompletion=lambda incomplete: [name for name in recipes() if name.startswith(incomplete)],
    ),
]
Epochs = Annotated[int | None, typer.Option("--epochs", min=0, help="Of every stage; default: the recipe's.")]
RunSeed = Annotated[int | None, typer.Option("--seed", min=0, max=2**62, help="runtime.seed; default: the recipe's.")]
RunDevice = Annotated[str | None, typer.Option("--device", help="runtime.device; default: the recipe's.")]
Rate = Annotated[str | None, typer.Option("--lr", help="Learning rate of every stage; default: the recipe's.")]
RunData = Annotated[str | None, typer.Option("--data", help="data.source; default: the recipe's.")]
RunEps = Annotated[str | None, typer.Option("--eps", help="threat.eps, e.g. 4/255; default: the recipe's.")]
RunBatchSize = Annotated[int | None, typer.Option("--batch-size", min=1, help="Of every stage; default: the recipe's.")]
RunDir = Annotated[Path | None, typer.Option("--run-dir", help="Folder of the run; the same one goes on with it.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results only.")]
Factory = Annotated[
    str | None,
    typer.Option(
        "--factory", callback=_at_hand,
        help="package.module:function that makes the network, where the run's class cannot be imported.",
    ),
]  # fmt: skip
AsJson = Annotated[bool, typer.Option("--json", help="Print results as JSON.")]
Norm = Annotated[str | None, typer.Option("--norm", help="Linf, L2 or L1; default: the run's.")]
OutputDir = Annotated[Path | None, typer.Option("--output", help="Where results go; default: the run.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Images at once.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**62, help="Of the attacks.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, or an accelerator by torch's name.")]
Open = Annotated[bool, typer.Option("--open", help="Open the page in the browser.")]
Data = Annotated[str | None, typer.Option("--data", help="As data.source; default: the run's.")]
ThreatName = Annotated[
    str | None, typer.Option("--threat", help="A threat that is no norm, such as flow; default: the run's.")
]
ImageSize = Annotated[str | None, typer.Option("--image-size", help="HEIGHTxWIDTH to which images are resized.")]
ImageColumn = Annotated[str | None, typer.Option("--image-column", help="Of --data, with images.")]
Plugins = Annotated[
    list[str] | None, typer.Option("--plugin", help="File or module that registers components; it is run. Repeatable.")
]
LabelColumn = Annotated[str | None, typer.Option("--label-column", help="Of --data, with labels.")]
Crop = Annotated[
    str | None, typer.Option("--crop", help="Middle of an image that is taken, e.g. 0.875; none: it is stretched.")
]
Resampling = Annotated[str | None, typer.Option("--resample", help="Filter of resizing, e.g. bilinear.")]
Seeds = Annotated[
    str | None,
    typer.Option(
        "--seeds", help="Where samples start: gaussian (fitted to the images), uniform or a source; default: the run's."
    ),
]
Channels = Annotated[int | None, typer.Option("--channels", help="1: read colours as grey; 3: grey as colours.")]
Depth = Annotated[
    int | None, typer.Option("--depth", min=1, max=16, help="Bits of a pixel, if files hold fewer than they could.")
]
SkipUnreadable = Annotated[bool, typer.Option("--skip-unreadable", help="Leave out images that cannot be read.")]


@app.callback()
def _options(
    ctx: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show where in the code an error arose.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    ctx.obj = {"debug": debug}
    if version:
        from importlib.metadata import version as installed

        typer.echo(installed("dualhead"))
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@app.command(epilog=examples_of("demo"))
def demo(run_dir: RunDir = None, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Compare guided distillation with its base method on real handwritten digits; about two minutes on two cores."""
    from dualhead.commands.demo import run_demo
    from dualhead.commands.terminal import (
        EvaluationDisplay,
        TrainingDisplay,
        accuracy_table,
        out,
        print_changed,
        print_row_lights,
        progress_bar,
    )

    with progress_bar(quiet=quiet) as bar, _stop_on_signals() as stop:
        comparison = run_demo(
            run_dir or Path("runs/demo"),
            progress=None if quiet else TrainingDisplay(bar),
            evaluation_progress=None if quiet else lambda row: EvaluationDisplay(bar, row),
            stop=stop,
            command=_command(),
        )
    if as_json:
        typer.echo(json.dumps({"title": comparison.title, "rows": comparison.rows}, indent=2))
        return
    print_row_lights(comparison.rows)
    out.print(accuracy_table(comparison.title, comparison.rows))
    print_changed(comparison.rows)
    if quiet:
        return
    for line in comparison.remarks:
        out.print(line, soft_wrap=True)


@app.command(epilog=examples_of("train"))
def train(
    recipe: Recipes,
    overrides: Overrides = None,
    data: RunData = None,
    eps: RunEps = None,
    epochs: Epochs = None,
    seed: RunSeed = None,
    device: RunDevice = None,
    lr: Rate = None,
    batch_size: RunBatchSize = None,
    run_dir: RunDir = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check recipe, data and network, tell the cost, and begin nothing.")
    ] = False,
    plugin: Plugins = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Leave in RUN/profile where the time of steps goes.")
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train as a recipe says, evaluate the result; the same command goes on with a run that was stopped."""
    from dualhead.commands.overrides import Shortcuts, naming_stages, with_shortcuts
    from dualhead.commands.terminal import (
        EvaluationDisplay,
        TrainingDisplay,
        accuracy_table,
        err,
        out,
        print_changed,
        print_row_lights,
        print_sequence,
        progress_bar,
        table_title,
    )
    from dualhead.runs import RunFolder, changes
    from dualhead.runs import train as run_training
    from dualhead.system.processes import joined

    chosen = Shortcuts(epochs, seed, device, lr, batch_size, data, eps)
    read, notes = with_shortcuts(recipe, overrides or [], plugin or [], chosen)
    folder = RunFolder(run_dir or Path("runs") / read.name)
    if not quiet and _speaks():
        for note in notes:
            err.print(note, soft_wrap=True)
    names = [stage.name for stage in read.stages]
    if dry_run:
        changes(folder.path, read)  # refuses a folder that holds something else
        with naming_stages(names, overrides or []):
            _tell_recipe(read, as_json=as_json, quiet=quiet, cost=True, strict=True)
        return
    done_before = folder.report.is_file()
    with (
        _stop_on_signals() as stop,
        joined() as group,
        progress_bar(quiet=quiet or not group.first) as bar,
        naming_stages(names, overrides or []),
    ):
        result = run_training(
            read,
            run_dir=folder.path,
            progress=None if quiet else TrainingDisplay(bar, read),
            evaluation_progress=None if quiet else lambda row: EvaluationDisplay(bar, row),
            stop=stop,
            command=_command(),
            profile=profile,
        )
    if not group.first:
        return
    if done_before and not quiet:
        told = "was finished already, nothing is trained again; for another run choose another --run-dir"
        err.print(f"{folder.path}: {told}", soft_wrap=True)
    rows = [row.describe() for row in result.rows]
    if as_json:
        more = {} if result.sequence is None else {"sequence": result.sequence}
        typer.echo(json.dumps({"run": str(result.run_dir), "rows": rows, **more}, indent=2))
        return
    print_row_lights(rows)
    out.print(accuracy_table(table_title(result.rows[0].evaluation), rows))
    print_changed(rows)
    if result.sequence is not None:
        print_sequence(result.sequence)
    if not quiet:
        if profile:
            out.print(f"profile: {folder.profile}, a table and a trace for each stage", soft_wrap=True)
        out.print(f"run: {folder.path}, report: {folder.report}", soft_wrap=True)


@app.command(epilog=examples_of("show"))
def show(
    recipe: Recipes,
    overrides: Overrides = None,
    data: RunData = None,
    eps: RunEps = None,
    epochs: Epochs = None,
    seed: RunSeed = None,
    device: RunDevice = None,
    lr: Rate = None,
    batch_size: RunBatchSize = None,
    cost: Annotated[bool, typer.Option("--cost/--no-cost", help="Try a few steps of each stage, and tell.")] = True,
    plugin: Plugins = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Print a recipe in full, with what training by it costs and how long it takes on this machine."""
    from dualhead.commands.overrides import Shortcuts, with_shortcuts

    chosen = Shortcuts(epochs, seed, device, lr, batch_size, data, eps)
    read, notes = with_shortcuts(recipe, overrides or [], plugin or [], chosen)
    for note in [] if quiet else notes:
        typer.echo(note, err=True)
    _tell_recipe(read, as_json=as_json, quiet=quiet, cost=cost, strict=False)


def _tell_recipe(recipe: Any, *, as_json: bool, quiet: bool, cost: bool, strict: bool) -> None:
    """Print a recipe and its cost; where that cannot be measured, fail if `strict`, else say why."""
    from dualhead.commands.terminal import print_costs
    from dualhead.runs import trial

    measured, why = None, None
    if cost:
        try:
            measured = trial(recipe)
        except UserError as error:
            if strict:
                raise
            why = str(error)
    if as_json:
        costs = None if measured is None else measured.describe()
        typer.echo(json.dumps({"recipe": recipe.resolved(), "cost": costs, "cost_unknown": why}, indent=2))
        return
    if not quiet:
        import yaml

        typer.echo(yaml.safe_dump(recipe.resolved(), sort_keys=False).rstrip())
    if measured is not None:
        print_costs(measured)
    elif why is not None:
        typer.echo(f"cost: not known, since a few steps cannot be tried: {why}")


@app.command("runs", epilog=examples_of("runs"))
def list_runs(
    folder: Annotated[Path, typer.Argument(help="A folder with runs in it, at any depth.")] = Path("runs"),
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """List the runs under a folder: state, recipe, clean and robust accuracy, and what is wrong with them."""
    del quiet  # there are results only
    from dualhead.commands.runs import list_of
    from dualhead.commands.terminal import print_runs

    found = list_of(folder)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    print_runs(found)


@app.command(epilog=examples_of("evaluate"))
def evaluate(
    model: ModelName,
    attack: Annotated[
        list[str] | None, typer.Option("--attack", help="Repeatable, or with commas; default: the run's, else pgd-40.")
    ] = None,
    eps: Annotated[str | None, typer.Option("--eps", help="Radius, 8/255; with commas, robustness over eps.")] = None,
    norm: Norm = None,
    threat: Annotated[
        list[str] | None,
        typer.Option("--threat", help="KIND:EPS, as L1:12; several with commas: a column each. Or a name, with --eps."),
    ] = None,
    data: Data = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first so many test images.")] = None,
    stage: Annotated[
        str | None, typer.Option("--stage", help="A finished stage of the run; default: the last.")
    ] = None,
    checkpoint: Annotated[str | None, typer.Option("--checkpoint", help="best or last epoch, or by-samples.")] = None,
    output: Annotated[str | None, typer.Option("--output-of", help="head1, head2, ..., mean or aggregate.")] = None,
    routes: Annotated[
        str | None,
        typer.Option(
            "--routes", help="Of tied heads: all, or some of own, crossed, merged, curve, transfer, gaps, with commas."
        ),
    ] = None,
    routers: Annotated[
        bool, typer.Option("--routers", help="Of an aggregator: the sentinel, each router, and controls.")
    ] = False,
    output_dir: OutputDir = None,
    image_size: ImageSize = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    crop: Crop = None,
    resample: Resampling = None,
    channels: Channels = None,
    depth: Depth = None,
    skip_unreadable: SkipUnreadable = False,
    batch_size: BatchSize = 256,
    seed: Seed = 0,
    device: Device = "auto",
    precision: Annotated[
        str,
        typer.Option("--precision", help="Of the search: auto (gradients in float32), float32 or bf16."),
    ] = "auto",
    save_adversarial: Annotated[bool, typer.Option("--save-adversarial", help="Keep the examples found.")] = False,
    generation: Annotated[bool, typer.Option("--generation", help="Also measure samples of every class.")] = False,
    samples: Annotated[int, typer.Option("--samples", min=2, help="With --generation: in all.")] = 1000,
    sample_steps: Annotated[
        str | None, typer.Option("--sample-steps", help="With --generation: numbers to choose from, 8,16,32.")
    ] = None,
    step_size: Annotated[float, typer.Option("--step-size", help="With --generation: L2 length of a step.")] = 0.2,
    seeds: Seeds = None,
    judge: Annotated[
        str | None, typer.Option("--judge", help="With --generation: backbone, or folder, of the network that judges.")
    ] = None,
    ood: Annotated[
        list[str] | None,
        typer.Option("--ood", help="Images that are not in distribution: a source, uniform or gaussian; repeatable."),
    ] = None,
    poison: Annotated[
        str | None,
        typer.Option("--poison", help="Also measure the trigger of a poison: patch, or '{name: patch, target: 3}'."),
    ] = None,
    clean_model: Annotated[
        str | None, typer.Option("--clean-model", help="With --poison: a model of clean data, to compare with.")
    ] = None,
    transfer_from: Annotated[
        str | None,
        typer.Option("--transfer-from", help="Another model: also measure on images made against it alone."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew, whatever lies in --output.")] = False,
    factory: Factory = None,
    plugin: Plugins = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure clean and robust accuracy of a run or a model."""
    del factory  # its callback has put it in place
    from dualhead.commands.evaluate import assess
    from dualhead.commands.resolve import Request
    from dualhead.commands.terminal import EvaluationDisplay, out, print_evaluation, progress_bar
    from dualhead.evaluation import split_names
    from dualhead.system.processes import joined

    _load_plugins(plugin)
    threats = tuple(text for given in threat or () for text in split_names(given))
    named = len(threats) == 1 and ":" not in threats[0]
    request = Request(
        model=model,
        attacks=tuple(name for given in attack or () for name in split_names(given)),
        eps=eps,
        norm=norm,
        threat=threats[0] if named else None,
        threats=() if named else threats,
        data=data,
        limit=limit,
        stage=stage,
        checkpoint=checkpoint,
        output=output,
        routes=routes,
        routers=routers,
        output_dir=output_dir,
        image_size=image_size,
        image_column=image_column,
        label_column=label_column,
        crop=crop,
        resample=resample,
        channels=channels,
        depth=depth,
        skip_unreadable=skip_unreadable,
        batch_size=batch_size,
        seed=seed,
        device=device,
        precision=precision,
        save_adversarial=save_adversarial,
        transfer_from=transfer_from,
        overwrite=overwrite,
        command=_command(),
        generation=generation,
        samples=samples,
        sample_steps=sample_steps,
        step_size=step_size,
        seeds=seeds,
        judge=judge,
        ood=tuple(ood or ()),
        poison=poison,
        clean_model=clean_model,
    )
    if routes is not None or routers:
        _evaluate_parts(request, quiet=quiet, as_json=as_json)
        return
    with _stop_on_signals() as stop, joined() as group, progress_bar(quiet=quiet or not group.first) as bar:
        quiet = quiet or not group.first
        folder, evaluation = assess(request, None if quiet else EvaluationDisplay(bar, request.label), stop)
    if not group.first:
        return
    if as_json:
        typer.echo(json.dumps(evaluation.results, indent=2))
        return
    print_evaluation(request.label, evaluation)
    if not quiet:
        out.print(f"results: {folder}", soft_wrap=True)


def _evaluate_parts(request: Any, *, quiet: bool, as_json: bool) -> None:
    """Measure routes of tied heads, or routers of an aggregator, and print each as the classifier that it is."""
    from dualhead.commands.evaluate import assess_routers, assess_routes
    from dualhead.commands.terminal import (
        EvaluationDisplay,
        accuracy_table,
        out,
        print_changed,
        print_lights,
        progress_bar,
    )
    from dualhead.report import route_rows, router_lines, router_rows
    from dualhead.system.processes import joined

    if request.routes is not None and request.routers:
        raise UserError("--routes and --routers: give one of them")
    parts, assess, rows_of, lines_of = (
        ("routers", assess_routers, router_rows, router_lines)
        if request.routers
        else ("routes", assess_routes, route_rows, lambda found: [found["warning"]])
    )
    with _stop_on_signals() as stop, joined() as group, progress_bar(quiet=quiet or not group.first) as bar:
        quiet = quiet or not group.first
        folder, found = assess(request, None if quiet else lambda name: EvaluationDisplay(bar, name), stop)
    if not group.first:
        return
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    if rows := rows_of(found):
        print_lights([(row["name"], row["checks"]) for row in rows])
        out.print(accuracy_table(f"{parts}, in percent, of {found['num_samples']} test images", rows))
    print_changed(rows)
    for line in lines_of(found):
        out.print(line, soft_wrap=True, markup=False)
    if not quiet:
        out.print(f"results: {folder}", soft_wrap=True)


@app.command(epilog=examples_of("gallery"))
def gallery(
    model: ModelName,
    limit: Annotated[int, typer.Option("--limit", min=1, help="The first so many test images.")] = 48,
    landscape: Annotated[
        str | None, typer.Option("--landscape", help="Samples to map, by number, with commas; default: some.")
    ] = None,
    eps: Annotated[str | None, typer.Option("--eps", help="The largest radius, 8/255; default: the run's.")] = None,
    norm: Norm = None,
    threat: ThreatName = None,
    data: Data = None,
    output_dir: OutputDir = None,
    image_size: ImageSize = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    crop: Crop = None,
    resample: Resampling = None,
    channels: Channels = None,
    depth: Depth = None,
    skip_unreadable: SkipUnreadable = False,
    batch_size: BatchSize = 64,
    seed: Seed = 0,
    device: Device = "auto",
    factory: Factory = None,
    plugin: Plugins = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Attack some images at several eps and map logits around them, for the gallery of the next report."""
    del factory  # its callback has put it in place
    from dualhead.commands.evaluate import exhibit
    from dualhead.commands.resolve import Request

    _load_plugins(plugin)
    try:
        mapped = None if landscape is None else [int(word) for word in landscape.split(",") if word.strip()]
    except ValueError:
        raise UserError(f"--landscape {landscape}: write numbers of samples, e.g. --landscape 3,17") from None
    request = Request(
        model=model, eps=eps, norm=norm, threat=threat, data=data, limit=limit, output_dir=output_dir,
        image_size=image_size, image_column=image_column, label_column=label_column, crop=crop, resample=resample,
        channels=channels, depth=depth, skip_unreadable=skip_unreadable, batch_size=batch_size, seed=seed,
        device=device,
    )  # fmt: skip
    path, made = exhibit(request, mapped)
    if as_json:
        facts = {"gallery": str(path), "images": len(made.label), "eps": made.eps.tolist()}
        typer.echo(json.dumps({**facts, "landscapes": made.index[made.landscape_rows].tolist()}, indent=2))
    elif not quiet:
        where = (
            "" if request.is_run or (path.parent / "results.json").is_file() else " where it lies beside an evaluation"
        )
        typer.echo(f"gallery: {path}; `dualhead report` shows it{where}")


@app.command(epilog=examples_of("play"))
def play(
    model: ModelName,
    eps: Annotated[str | None, typer.Option("--eps", help="Where the slider starts; default: the run's.")] = None,
    norm: Norm = None,
    threat: ThreatName = None,
    data: Data = None,
    image_size: ImageSize = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    crop: Crop = None,
    resample: Resampling = None,
    channels: Channels = None,
    depth: Depth = None,
    skip_unreadable: SkipUnreadable = False,
    beside: Annotated[
        str | None, typer.Option("--beside", help="Another model of the same images, such as an undefended one.")
    ] = None,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any that is free.")] = 0,
    open_page: Open = False,
    device: Device = "auto",
    factory: Factory = None,
    plugin: Plugins = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Serve a page, to this machine only, on which to choose an image, move eps and watch the heads under attack."""
    del factory  # its callback has put it in place
    from dualhead.commands.play import LOOPBACK, Playground, check_beside, serve
    from dualhead.commands.resolve import Request, resolve

    _load_plugins(plugin)
    request = Request(
        model=model, eps=eps, norm=norm, threat=threat, data=data, image_size=image_size, image_column=image_column,
        label_column=label_column, crop=crop, resample=resample, channels=channels, depth=depth,
        skip_unreadable=skip_unreadable, device=device,
    )  # fmt: skip
    shown = resolve(request)
    other = None
    if beside is not None:
        found = resolve(replace(request, model=beside))
        check_beside(beside, found.images, model, shown.images)
        other = beside, found.model
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell started this in the background, ignoring them
        signal.signal(number, signal.default_int_handler)
    server = serve(Playground(shown.model, shown.images, shown.threat, shown.framing, beside=other), port)
    address = f"http://{LOOPBACK}:{server.server_port}/"
    if as_json:
        typer.echo(json.dumps({"address": address}))
    else:
        typer.echo(address if quiet else f"play: {address} (Ctrl-C ends it)")
    if open_page:
        _open(address)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


@app.command(epilog=examples_of("layers"))
def layers(
    model: Annotated[str, typer.Argument(help="A backbone (wideresnet-34-10), package.module:factory, run or model.")],
    image_shape: Annotated[str, typer.Option("--image-shape", help="CHANNELSxHEIGHTxWIDTH")] = "3x32x32",
    classes: Annotated[int, typer.Option("--classes", min=2)] = 10,
    plugin: Plugins = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Where a second head can be attached: what crosses there, parameters and cost behind it, way of cutting."""
    from dataclasses import asdict

    from dualhead.commands.evaluate import list_layers
    from dualhead.commands.terminal import print_table

    _load_plugins(plugin)
    found = list_layers(model, image_shape, classes)
    if as_json:
        typer.echo(json.dumps([asdict(layer) for layer in found], indent=2))
        return
    rows = [
        [
            f"{layer.name} *" if layer.recommended else layer.name,
            ", ".join("x".join(map(str, shape)) for shape in layer.shapes),
            f"{layer.parameters_before:,}",
            f"{layer.parameters_after:,}",
            f"{layer.cost_after:.0%}",
            layer.how or f"no: {layer.why_not}",
        ]
        for layer in found
    ]
    columns = ("layer", "crosses", "parameters before", "parameters after", "cost behind", "cut")
    print_table({name: "left" if name in ("layer", "cut") else "right" for name in columns}, rows)
    best = next((layer for layer in found if layer.recommended), None)
    if best is not None and not quiet:
        typer.echo(f"* recommended: {1 - best.cost_after:.0%} of the forward cost lies before it; about 30% is usual")


@app.command(epilog=examples_of("export"))
def export(
    run: Annotated[Path, typer.Argument(help="A finished run.")],
    to: Annotated[Path, typer.Option("--to", help="A new or empty folder.")],
    output_of: Annotated[
        str | None, typer.Option("--output-of", help="One head, head1, head2, ..., as a plain classifier.")
    ] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Also as ONNX, checked with onnxruntime.")] = False,
    push: Annotated[str | None, typer.Option("--push", help="Also upload to the Hub as OWNER/NAME.")] = None,
    factory: Factory = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write weights, configuration and a model card to a folder that `dualhead.load` reads."""
    del factory  # its callback has put it in place
    from dataclasses import asdict

    from dualhead.commands.terminal import print_lights
    from dualhead.saving import check_hub_name, checks_of, export_onnx, push_to_hub, require_onnx
    from dualhead.saving import export as export_model

    if onnx:  # what cannot be is refused before anything is written
        require_onnx()
    if push is not None:
        check_hub_name(push)
    folder = export_model(run, to, output=output_of)
    checks = checks_of(folder, run)
    check = export_onnx(folder) if onnx else None
    address = None if push is None else push_to_hub(folder, push)
    if as_json:
        facts = None if check is None else {**asdict(check), "path": str(check.path)}
        typer.echo(json.dumps({"model": str(folder), "checks": checks, "onnx": facts, "hub": address}, indent=2))
        return
    print_lights([("", checks)])
    if not quiet:
        typer.echo(f"model: {folder}")
        if check is not None:
            typer.echo(
                f"ONNX: {check.path}; logits of {check.images} images differ by at most {check.difference:.2g} from "
                f"PyTorch's, the largest of which is {check.scale:.2g}"
            )
        if address is not None:
            typer.echo(f"Hub: {address}")


@app.command(epilog=examples_of("report"))
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Runs, evaluations, or folders of runs.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file.")] = Path("report.html"),
    open_page: Open = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write one self-contained page about runs, side by side: verdict, accuracies, curves, diagnostics, examples."""
    from dualhead.report import write_report

    if output.suffix.lower() not in (".html", ".htm"):
        kind = f"a {output.suffix} file" if output.suffix else "a name without an ending"
        advice = "; the browser prints the page to PDF" if output.suffix.lower() == ".pdf" else ""
        raise UserError(f"--output {output}: the report is an HTML page, not {kind}; write {output.stem}.html{advice}")
    path = write_report(runs, output)
    if open_page:
        _open(path.absolute().as_uri())
    if as_json:
        typer.echo(json.dumps({"report": str(path)}, indent=2))
    elif not quiet:
        typer.echo(f"report: {path}")


@app.command(epilog=examples_of("info"))
def info(
    run: Annotated[Path, typer.Argument(help="A run, finished or not.")], quiet: Quiet = False, as_json: AsJson = False
) -> None:
    """Say where a run stands: stages, epochs, accuracies on held-out and test images, and who works on it."""
    from dualhead.commands.terminal import accuracy_table, out, print_changed, print_row_lights, stage_table
    from dualhead.report import summary
    from dualhead.system.lock import owner_of

    facts = summary(run)
    facts["process"] = owner_of(run)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    if not quiet:
        at_work, state = facts["process"], facts["state"]
        if at_work:
            told = f"{state}, process {at_work.get('pid')} on {at_work.get('host')} is at work"
        else:
            told = state if state == "finished" else f"stopped while {state}; the command that started it goes on"
        out.print(f"{run}: recipe {facts['recipe']}, {told}", soft_wrap=True, markup=False)
    print_row_lights(facts["rows"])
    out.print(stage_table(facts["stages"]))
    if facts["rows"]:
        out.print(accuracy_table("test images, accuracy in percent, with 95 % intervals", facts["rows"]))
    print_changed(facts["rows"])
    for note in [] if quiet else facts["notes"]:
        out.print(note, soft_wrap=True, markup=False)


@app.command(epilog=examples_of("sweep"))
def sweep(
    recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe, or a YAML file.")],
    settings: Annotated[list[str] | None, typer.Argument(help="KEY=A,B,C for each axis, KEY=A for all runs.")] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Runs of each point, with seeds 0, 1, ...")] = 1,
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="Folder of the sweep; the same goes on with it.")
    ] = None,
    shard: Annotated[str, typer.Option("--shard", help="I/N: every N-th run from the I-th (from 0) on.")] = "0/1",
    scheduler: Annotated[
        str | None, typer.Option("--on", help="Queue each run as a job: slurm, or local for processes here.")
    ] = None,
    job_settings: Annotated[
        list[str] | None, typer.Option("--job", help="With --on: KEY=VALUE of submitit, e.g. slurm_partition=gpu.")
    ] = None,
    at_once: Annotated[int | None, typer.Option("--at-once", min=1, help="With --on: jobs queued at a time.")] = None,
    data: RunData = None,
    eps: RunEps = None,
    epochs: Epochs = None,
    device: RunDevice = None,
    lr: Rate = None,
    batch_size: RunBatchSize = None,
    plugin: Plugins = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train and evaluate a grid of settings, and write one table; the same command goes on where it was stopped."""
    from dualhead.commands.overrides import Shortcuts, settings_with_shortcuts
    from dualhead.commands.submit import dispatch_sweep
    from dualhead.commands.sweep import plan, run_sweep
    from dualhead.commands.terminal import TrainingDisplay, err, progress_bar, sweep_table

    first, slash, count = shard.partition("/")
    if not (slash and first.isdigit() and count.isdigit() and int(first) < int(count)):
        raise UserError(f"--shard {shard}: write I/N with I from 0 to N - 1, e.g. 0/4")
    if scheduler is None and (job_settings or at_once):
        raise UserError("--job and --at-once are for jobs of a scheduler; name it with --on, e.g. --on slurm")
    if scheduler is not None and shard != "0/1":
        raise UserError("--shard shares runs out by hand, which --on leaves to the scheduler; use one of them")
    folder = out_dir or Path("runs") / f"sweep-{Path(recipe).stem}"

    def tell(line: str) -> None:
        if not quiet:
            err.print(line, soft_wrap=True, markup=False)

    chosen = Shortcuts(epochs, None, device, lr, batch_size, data, eps)
    written, notes = settings_with_shortcuts(recipe, settings or [], plugin or [], chosen)
    for note in notes:
        tell(note)
    jobs = plan(recipe, written, seeds, plugin or [])

    with progress_bar(quiet=quiet or scheduler is not None) as bar, _stop_on_signals() as stop:
        if scheduler is not None:
            rows = dispatch_sweep(
                jobs, folder, scheduler=scheduler, settings=job_settings or [], at_once=at_once, tell=tell, stop=stop,
                command=_command(),
            )  # fmt: skip
        else:
            rows = run_sweep(
                jobs,
                folder,
                shard=(int(first), int(count)),
                progress=None if quiet else TrainingDisplay(bar),
                tell=tell,
                stop=stop,
                command=_command(),
            )
    if as_json:
        typer.echo(json.dumps({"sweep": str(folder), "rows": rows}, indent=2))
        return
    sweep_table(rows)
    typer.echo(f"table: {folder / 'sweep.csv'}, {folder / 'sweep.json'}; compare: dualhead compare {folder}")


@app.command(epilog=examples_of("compare"))
def compare(
    places: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Runs, evaluations, or folders of runs.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the JSON to this file.")] = None,
    specialist: Annotated[
        list[Path] | None,
        typer.Option(
            "--specialist", help="A run made for one of several threats; repeatable. Accuracies as its share."
        ),
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Set runs side by side: accuracy over seeds, cost, Pareto front at equal cost, and paired tests with the first."""
    del quiet  # there are results only
    from dualhead.commands.compare_samples import compare_samples
    from dualhead.commands.terminal import out, print_samples, print_sequences, print_standings
    from dualhead.runs import normalised, read_entries, sequences, standings
    from dualhead.system.files import write_json

    entries, made_for_one = read_entries(places), []
    found = standings(entries)
    if specialist:
        made_for_one = read_entries(specialist)
        found["against_specialists"] = normalised(entries, made_for_one)
    found["sequences"] = sequences(entries, made_for_one)
    samples = compare_samples(entries)
    if samples is not None:
        found["generation"] = samples
    if output is not None:
        write_json(output, found)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    print_standings(found)
    print_sequences(found["sequences"])
    if samples is not None:
        print_samples(samples)
    for row in found.get("against_specialists", []):
        shares = ", ".join(f"{label} {share:.1%}" for label, share in row["shares"].items())
        name = f"{row['label']}, {row['name']}" if row["name"] else row["label"]
        out.print(f"share of specialists, {name}, seed {row['seed']}: {shares}", soft_wrap=True, markup=False)


@app.command("list", epilog=examples_of("list"))
def list_components(
    kind: Annotated[str | None, typer.Argument(help="objectives, attacks, ..., recipes; default: all")] = None,
    plugin: Plugins = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Name what ships or is registered, a line each, and say where it comes from if it does not ship."""
    from importlib.metadata import entry_points

    from dualhead.components.plugins import ENTRY_POINTS

    chosen = kind_of(kind) if kind is not None else None
    if kind is not None and chosen is None:
        raise UserError(f"list {kind}: unknown kind; known: {', '.join(shipped())}")
    found, origins = shipped(), {}
    if plugin or entry_points(group=ENTRY_POINTS):  # only code from outside has to be run to be known
        origins = _add_registered(found, plugin)
    kinds = {name: found[name] for name in ([chosen] if chosen else found)}
    if as_json:
        outside = {name: origins[name] for name in kinds if origins.get(name)}
        names: dict[str, Any] = {name: list(known) for name, known in kinds.items()}
        typer.echo(json.dumps({**names, **({"from": outside} if outside else {})}, indent=2))
        return
    for name, known in kinds.items():
        places = origins.get(name, {})
        if not chosen:
            typer.echo(f"{name}:")
        shown = {n: f"{n} ({places[n]})" if n in places else n for n in known}
        width = max((len(text) for n, text in shown.items() if n not in places), default=0)
        for n, text in shown.items():
            typer.echo((text if quiet else f"{text:{width}}  {known[n]}").rstrip() if chosen else
                       (f"  {text}" if quiet else f"  {text:{width}}  {known[n]}").rstrip())  # fmt: skip


def _add_registered(found: dict[str, dict[str, str]], plugin: list[str] | None) -> dict[str, dict[str, str]]:
    """Add components from outside to those that ship; return by kind where each comes from."""
    from dualhead.components.plugins import load_installed
    from dualhead.recipe import REGISTRIES

    _load_plugins(plugin)
    load_installed()
    origins: dict[str, dict[str, str]] = {}
    for kind, registry in REGISTRIES.items():
        for name in registry.names():
            place = registry.origin(name)
            if place is not None:
                origins.setdefault(kind, {})[name] = place
                found[kind][name] = first_line(registry.get(name).__doc__)
        found[kind] = dict(sorted(found[kind].items()))
    return origins


def _open(address: str) -> None:
    """Show a page in the browser; where there is none, say so."""
    import webbrowser

    if not webbrowser.open(address):
        typer.echo(f"no browser found here; open {address} yourself", err=True)


@app.command("sample", epilog=examples_of("sample"))
def sample_images(
    model: ModelName,
    classes: Annotated[str | None, typer.Option("--classes", help="0-3,7 or names; default: all.")] = None,
    count: Annotated[int, typer.Option("--count", min=1, help="Samples of each class.")] = 16,
    steps: Annotated[int, typer.Option("--steps", min=0, help="Of the ascent; 0 gives the seeds.")] = 16,
    step_size: Annotated[float, typer.Option("--step-size", help="L2 length of a step, pixels in [0, 1].")] = 0.2,
    seeds: Seeds = None,
    data: Data = None,
    output_dir: Annotated[Path | None, typer.Option("--output", help="A folder; default: samples in the run.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**62)] = 0,
    device: Device = "auto",
    factory: Factory = None,
    plugin: Plugins = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Let noise climb the logits of classes: samples.npz, and sheets of samples and of the way to them."""
    del factory  # its callback has put it in place
    from dualhead.commands.generate import draw_samples
    from dualhead.commands.resolve import Request

    _load_plugins(plugin)
    # Sampling has no ball of its own, and a model that says nothing of one is still to be resolved.
    request = Request(model=model, data=data, norm="L2", eps="1", output_dir=output_dir, seed=seed, device=device)
    facts = draw_samples(request, classes, count, steps, step_size, seeds)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    elif not quiet:
        typer.echo(f"samples: {facts['output']} ({facts['samples']} images, {steps} steps each)")


@app.command("counterfactual", epilog=examples_of("counterfactual"))
def counterfactual_images(
    model: ModelName,
    to: Annotated[str | None, typer.Option("--to", help="Target classes, 0-3,7 or names; default: all.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="The first so many test images.")] = 10,
    radius: Annotated[float, typer.Option("--radius", help="L2 radius of the ball, pixels in [0, 1].")] = 4.0,
    steps: Annotated[int, typer.Option("--steps", min=1)] = 40,
    step_size: Annotated[float | None, typer.Option("--step-size", help="Default: 2.5 radius / steps.")] = None,
    data: Data = None,
    output_dir: Annotated[Path | None, typer.Option("--output", help="A folder; default: in the run.")] = None,
    device: Device = "auto",
    factory: Factory = None,
    plugin: Plugins = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Turn test images into other classes within an L2 ball: images, paths, distances, probabilities and a sheet."""
    del factory  # its callback has put it in place
    from dualhead.commands.generate import draw_counterfactuals
    from dualhead.commands.resolve import Request

    _load_plugins(plugin)
    request = Request(model=model, data=data, norm="L2", eps=str(radius), output_dir=output_dir, device=device)
    facts = draw_counterfactuals(request, to, limit, radius, steps, step_size)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    elif not quiet:
        typer.echo(
            f"counterfactuals: {facts['output']} ({facts['images']} images to {len(facts['targets'])} classes; mean "
            f"probability of the target {facts['target_probability']:.2f} at mean L2 distance {facts['distance']:.2f})"
        )


def _load_plugins(sources: list[str] | None) -> None:
    """Run the files and modules that `--plugin` names."""
    from dualhead.components.plugins import load

    for source in sources or []:
        with under("--plugin"):
            load(source)


@contextmanager
def _stop_on_signals() -> Iterator[Any]:
    """A function that tells whether SIGINT or SIGTERM has come; a second one ends the program at once."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _command() -> str:
    return shlex.join(["dualhead", *sys.argv[1:]])


def main() -> None:
    """The entry point: every ending is one line and an exit status."""
    debug = "--debug" in sys.argv
    if not _speaks():
        logging.getLogger("dualhead").setLevel(logging.ERROR)
    keep_freed_blocks()
    said_once = Once()
    if logging.lastResort is not None:  # what prints warnings where nobody has set up logging
        logging.lastResort.addFilter(said_once)
    try:
        words = [word for word in sys.argv[1:] if word != "--debug"]  # it may stand anywhere
        sys.exit(app(words, prog_name="dualhead", standalone_mode=False) or 0)
    except UserError as error:
        _end(error, 2, debug)
    except _UsageError as error:
        command = error.ctx.command_path if error.ctx else "dualhead"
        _end(f"{error.format_message().rstrip('.')} (see `{command} --help`)", 2, debug)
    except _ClickError as error:
        _end(error.format_message(), error.exit_code, debug)
    except Interrupted as error:
        _end(error, STOPPED, debug)
    except (KeyboardInterrupt, typer.Abort):
        _end("stopped; the same command goes on from the last saved state", STOPPED, debug)
    except RunError as error:
        _end(error, 1, debug)
    except OSError as error:  # no space, no permission, a folder that went away
        _end(f"{error.filename or 'file'}: {error.strerror or error}", 1, debug)
    finally:
        if logging.lastResort is not None:
            logging.lastResort.removeFilter(said_once)


def _speaks() -> bool:
    """Whether this is the first process of a run: all of them find out the same, and one says so."""
    return os.environ.get("RANK", "0") == "0"


def _end(message: object, status: int, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    if isinstance(message, UserError | Interrupted) and not _speaks():
        sys.exit(status)
    print(f"dualhead: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(status)
