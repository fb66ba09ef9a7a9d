"""The command line: parse, call one function, print. Results go to stdout, progress and logs to stderr.

A knob's flag, type, default and help come from its place in config.py; `--config` reads the same knobs from a file.
"""

import functools
import inspect
import logging
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from . import __version__
from .common import ConfigError, DreslclError, hold, rank_and_world
from .config import (
    PRESETS,
    TABLES,
    EncoderConfig,
    EvalConfig,
    ModelConfig,
    RunConfig,
    TileConfig,
    TrainConfig,
    knob_help,
    read_knobs,
    updated,
)

app = typer.Typer(
    help="Learn slide representations from whole-slide images and their pathology reports (DRE-SLCL, arXiv 2511.05034).",
    epilog="Exit codes: 0 done · 1 a failure, one line says which · 2 a mistake in the command · 130 stopped by Ctrl-C",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
log = logging.getLogger(__name__)

_UsageError: Any = typer.BadParameter.__mro__[1]  # typer brings its own click, and gives this class no public name
_FLAGS = {("EncoderConfig", "name"): "encoder"}  # a knob whose flag says more than its field
_PANELS = {
    "TileConfig": "Tiles",
    "EncoderConfig": "Encoder",
    "ModelConfig": "Aggregator",
    "TrainConfig": "Training",
    "EvalConfig": "Protocol",
}

_INPUTS, _MAPS, _RUNNING = "More inputs", "Heatmaps", "Running"
_STOPPED = "stopped; what is done is kept: run the same command again to go on"
_STOPPED_IN = {
    "pretrain": "stopped; whole epochs are kept: run the same command again with --resume to go on",
    "demo": "stopped; delete the folder of --out, or choose another, and run it again",
}


def option(text: str, *names: str, panel: str | None = None, **rest: Any) -> Any:
    """A typer option in a panel of the help."""
    return typer.Option(*names, help=text, rich_help_panel=panel, **rest)


Out = Annotated[Path, option("Folder for the results.", "--out", "-o", file_okay=False)]
Workers = Annotated[int, option("Threads that read; 0: one per CPU, at most 8.", panel=_RUNNING, min=0)]
FeatureFolder = Annotated[
    Path | None,
    option(
        "Folder of tile features made elsewhere (TRIDENT, CLAM or STAMP layout), in place of pixels.",
        "--features",
        panel=_INPUTS,
        exists=True,
        file_okay=False,
    ),
]
Patients = Annotated[
    Path | None, option("Table slide_id, patient_id; default: TCGA barcodes, else the slide itself.", panel=_INPUTS, exists=True)
]


def command(*configs: type, panel: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command whose flags are its own parameters and the knobs of `configs`; user errors end in one line.

    The function's parameter `knobs` receives the knobs given in a file or on the command line, by configuration class and name.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(function).parameters.values() if p.name != "knobs"]
        hints = get_type_hints(function, include_extras=True)
        parameters = [p.replace(annotation=hints[p.name]) for p in own]
        owner: dict[str, tuple[type, str]] = {}
        for config in configs:
            types: dict[str, Any] = get_type_hints(config)
            help_of = knob_help(config)
            for knob in fields(config):
                flag = _FLAGS.get((config.__name__, knob.name), knob.name)
                owner[flag] = (config, knob.name)
                text, kind, default = help_of[knob.name], types[knob.name], knob.default
                if isinstance(default, tuple):
                    text, kind, default = f"{text} Give it again for each.", list[int], list(default)
                parameters.append(_keyword(flag, kind, default, option(text, panel=_PANELS[config.__name__])))
        if configs:
            tables = ", ".join(name for name, config in TABLES.items() if config in configs)
            text = f"TOML file of knobs, tables {tables}; flags override it."
            parameters.append(_keyword("config", Path | None, None, option(text, panel=_RUNNING, exists=True)))

        @functools.wraps(function)
        def run(ctx: Any, **given: Any) -> None:
            file = given.pop("config", None)
            try:
                knobs = read_knobs(file) if file else {config: {} for config in configs}
                for flag, (config, name) in owner.items():
                    value = given.pop(flag)
                    if str(ctx.get_parameter_source(flag)).endswith("COMMANDLINE"):
                        knobs[config][name] = tuple(value) if isinstance(value, list) else value
                function(**given, **({"knobs": knobs} if configs else {}))
            except DreslclError as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
                raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from error
            except KeyboardInterrupt as error:
                print(f"\n{_STOPPED_IN.get(function.__name__, _STOPPED)}", file=sys.stderr)
                raise typer.Exit(130) from error

        context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
        run.__signature__ = inspect.Signature([context, *sorted(parameters, key=lambda p: p.kind)])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in [context, *parameters]}
        app.command(function.__name__.rstrip("_"), rich_help_panel=panel)(run)
        return function

    return register


def _keyword(name: str, kind: Any, default: Any, how: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, how])


class _Stderr(logging.Handler):
    """Prints to sys.stderr as it is at the moment: a progress bar puts itself in its place, so that lines go above it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=lambda on: _version(on))
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings and errors on stderr.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Debugging messages too.")] = False,
) -> None:
    logging.basicConfig(handlers=[_Stderr()], format="%(message)s", level=logging.WARNING, force=True)
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # a damaged scan is told in one line of our own
    quiet = quiet or rank_and_world()[0] > 0  # of several ranks one speaks
    logging.getLogger("dreslcl").setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
    logging.captureWarnings(True)  # what libraries warn of is for us to mend, not for the user
    logging.getLogger("py.warnings").setLevel(logging.WARNING if verbose else logging.ERROR)


def _version(on: bool) -> bool:
    if on:
        print(f"dreslcl {__version__}")
        raise typer.Exit
    return on


def say(line: str) -> None:
    """Print a line of the result, once where several ranks run."""
    if rank_and_world()[0] == 0:
        print(line)


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """A table on stdout: rich on a terminal, tab-separated text elsewhere."""
    if not sys.stdout.isatty():
        for row in [header, *rows]:
            print("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


@command(TileConfig, panel="Steps")
def tile(
    slides: Annotated[Path, typer.Argument(help="Scan, or folder of scans (searched with its subfolders).", exists=True)],
    *,
    out: Out,
    knobs: dict[type, dict[str, Any]],
    pack: Annotated[bool, option("Also write each slide's tiles as one BigTIFF, for slow network disks.", "--pack")] = False,
    overrides: Annotated[
        Path | None,
        option(
            "Table slide_id and any of mpp (of level 0), threshold, min_tissue, max_tiles, drop_pen, min_sharpness.",
            panel=_INPUTS,
            exists=True,
        ),
    ] = None,
    tissue_geojson: Annotated[
        Path | None, option("Folder of QuPath annotations <slide_id>.geojson, in place of our mask.", panel=_INPUTS, exists=True)
    ] = None,
    coords: Annotated[
        Path | None, option("Folder of coordinates that TRIDENT or CLAM wrote, in place of our grid.", panel=_INPUTS, exists=True)
    ] = None,
    workers: Workers = 0,
    shard: Annotated[
        str | None, option("I/N: do every N-th slide from the I-th (I from 0); default: as torchrun says.", panel=_RUNNING)
    ] = None,
    check: Annotated[
        Literal["sample", "full"] | None,
        option("Decode a sample of each scan's stored tiles, or all: finds damage.", panel=_RUNNING),
    ] = None,
    dry_run: Annotated[bool, option("Print what is there and would be done; write nothing.", "--dry-run", panel=_RUNNING)] = False,
) -> None:
    """Find the tissue tiles of each scan: grids, overlays and slides.csv."""
    from .tiles import Given, tile_slides

    rows = tile_slides(
        slides,
        out,
        TileConfig(**knobs[TileConfig]),
        given=Given(overrides, tissue_geojson, coords),
        workers=workers,
        shard=_shard(shard),
        write="nothing" if dry_run else "packs" if pack else "grids",
        check=check or "",
    )
    if dry_run:
        shown = "slide_id status width height levels regions mpp mpp_source tiles warning error".split()
        print_table(shown, [[str(row.get(c, "")) for c in shown] for row in rows])
    counts = {status: sum(row["status"] == status for row in rows) for status in ("ok", "empty", "error")}
    total = sum(int(row["tiles"] or 0) for row in rows)
    print(f"{len(rows)} slides: {counts['ok']} ok with {total:,} tiles, {counts['empty']} empty, {counts['error']} failed")
    if counts["error"]:
        raise DreslclError(f"{counts['error']} of {len(rows)} slides failed; their rows in {out / 'slides.csv'} say why")


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit()):
        raise ConfigError(f"--shard is I/N, like 0/4; got {text!r}")
    return int(index), int(count)


@command(EncoderConfig, ModelConfig, TrainConfig, panel="Steps")
def pretrain(
    work: Annotated[Path | None, typer.Argument(help="Folder that `dreslcl tile` wrote; or use --features.")] = None,
    *,
    reports: Annotated[
        Path | None,
        option("Table slide_id and/or patient_id, report (CSV, TSV); TCGA_Reports.csv; or HistGen JSON.", exists=True),
    ] = None,
    out: Out,
    knobs: dict[type, dict[str, Any]],
    exclude: Annotated[
        str | None, option("Keep slides out of pretraining: a file of slide or patient ids, or column=value of the reports table.")
    ] = None,
    val_column: Annotated[
        str | None,
        option("column=value of the reports table: slides for held-out retrieval after each epoch; the best epoch is kept."),
    ] = None,
    preset: Annotated[
        Literal["paper", "tiny", "clip-b32"] | None, option("Start from known settings; --config and flags override them.")
    ] = None,
    features: FeatureFolder = None,
    report_embeddings: Annotated[
        Path | None, option("HDF5 or npz of report vectors by slide or patient id, in place of texts.", panel=_INPUTS, exists=True)
    ] = None,
    patients: Patients = None,
    resume: Annotated[bool, option("Go on from the run's last whole epoch.", "--resume", panel=_RUNNING)] = False,
    dry_run: Annotated[
        bool, option("Print the cohort and what disk and memory it takes; train nothing.", "--dry-run", panel=_RUNNING)
    ] = False,
) -> None:
    """Train the tile encoder and the residual encoder against the reports."""
    from .trainer import pretrain as run

    settings = PRESETS[preset] if preset else RunConfig()
    settings = updated(settings, encoder=knobs[EncoderConfig], model=knobs[ModelConfig], train=knobs[TrainConfig])
    cohort = _cohort(work, features, patients).with_reports(reports, report_embeddings)
    cohort, _ = cohort.split(exclude, reports)
    cohort, held_out = cohort.split(val_column, reports)
    for note in cohort.notes:
        log.info(note)
    folder = run(cohort, out, settings, held_out=held_out, resume=resume, dry_run=dry_run)
    if not dry_run:
        say(f"model: {folder}")


def _cohort(work: Path | None, features: Path | None, patients: Path | None, *, skip: bool = False) -> Any:
    """The cohort; with `skip`, files of features that cannot be read are noted in it in place of an error."""
    from .cohort import Cohort
    from .formats import find_features

    if (work is None) == (features is None):
        raise ConfigError("give either the folder that `dreslcl tile` wrote, or --features FOLDER")
    if work:
        return Cohort.load(work, patients=patients)
    assert features is not None
    unreadable: dict[str, str] = {}
    return Cohort.of_features(find_features(features, unreadable if skip else None), patients=patients, unreadable=unreadable)


@command(panel="Steps")
def embed(
    work: Annotated[Path | None, typer.Argument(help="Folder that `dreslcl tile` wrote; or use --features.")] = None,
    *,
    model: Annotated[
        Path | None, option("RUN/model of a pretraining. Without it a slide is the mean of its tile features.", exists=True)
    ] = None,
    out: Out,
    by: Annotated[Literal["slide", "patient"], option("One vector per slide, or the mean of a patient's slides.")] = "slide",
    layout: Annotated[Literal["trident", "clam", "stamp", "patho-bench"], option("Also write files as this tool reads them.")] = "trident",
    tile_features: Annotated[bool, option("Also write each slide's tile features, in that layout.", "--tile-features")] = False,
    features: FeatureFolder = None,
    patients: Patients = None,
    encoder: Annotated[str, option("Without --model: the tile encoder, as in pretrain.", panel=_INPUTS)] = EncoderConfig.name,
    pretrained: Annotated[
        str | None, option("Without --model: OpenCLIP's tag of that encoder's weights, or a weights file.", panel=_INPUTS)
    ] = None,
    tile_batch: Annotated[int, option("Tiles in one pass of the encoder.", panel=_RUNNING, min=1)] = TrainConfig.tile_batch,
    precision: Annotated[
        Literal["auto", "fp32", "bf16"], option("Arithmetic of the tile encoder; auto: bf16 on a GPU that has it.", panel=_RUNNING)
    ] = "auto",
    workers: Workers = 0,
    from_bank: Annotated[
        bool, option("Encode nothing: use the rows of RUN/bank, as training last saw the tiles.", "--from-bank", panel=_RUNNING)
    ] = False,
    heatmaps: Annotated[
        bool,
        option(
            "Also draw OUT/heatmaps: the codeword of each tile; PNG and QuPath GeoJSON. Writes tile features too.",
            "--heatmaps",
            panel=_MAPS,
        ),
    ] = False,
    heatmap_text: Annotated[str | None, option("Also map each tile's contribution to the similarity with this text.", panel=_MAPS)] = None,
    heatmap_labels: Annotated[
        Path | None,
        option("Or its contribution to the slide's class: table slide_id or patient_id, and label.", panel=_MAPS, exists=True),
    ] = None,
    heatmap_column: Annotated[str, option("Column of that table.", panel=_MAPS)] = "subtype",
    force: Annotated[bool, option("Embed slides again that are done.", "--force", panel=_RUNNING)] = False,
) -> None:
    """Encode every tile of every slide and write one vector per slide."""
    from .embedding import embed as run

    if heatmaps and (model is None or work is None):
        raise ConfigError("--heatmaps needs --model RUN/model, and the folder that `dreslcl tile` wrote: maps are drawn over the scans")
    if (heatmap_text or heatmap_labels) and not heatmaps:
        raise ConfigError("--heatmap-text and --heatmap-labels need --heatmaps")
    cohort = _cohort(work, features, patients, skip=True)
    result = run(
        cohort,
        out,
        model=model,
        encoder=None if model else EncoderConfig(encoder, pretrained),
        batch=tile_batch,
        precision=precision,
        workers=workers or min(8, os.cpu_count() or 1),
        by=by,
        layout=layout,
        tile_features=tile_features or (heatmaps and not from_bank),
        from_bank=from_bank,
        force=force,
    )
    say(f"{len(result)} vectors of width {result.vectors.shape[1]}: {out / 'embeddings.h5'}")
    failed = dict(result.failed)
    if heatmaps and model:
        from .heatmaps import draw_heatmaps

        failed |= draw_heatmaps(
            *(cohort, out, model, result),
            text=heatmap_text,
            labels=heatmap_labels,
            column=heatmap_column,
            layout=layout,
            from_bank=from_bank,
            force=force,
        )
        say(f"maps: {out / 'heatmaps'}")
    if failed:
        slide, why = next(iter(failed.items()))
        total = len(cohort) + len(cohort.unreadable)
        raise DreslclError(f"{len(failed)} of {total} slides failed, the others are done; {slide}: {why}")


@command(EvalConfig, panel="Steps")
def eval_(
    embeddings: Annotated[Path, typer.Argument(help="Folder (or embeddings.h5) that `dreslcl embed` wrote.", exists=True)],
    *,
    labels: Annotated[Path | None, option("Table slide_id or patient_id, and label columns.", exists=True)] = None,
    task: Annotated[Literal["subtype", "recognition", "mutation", "retrieval", "zeroshot"], option("What to measure.")],
    out: Out,
    knobs: dict[type, dict[str, Any]],
    column: Annotated[list[str] | None, option("Label column; give it again for several genes. Default: the task's name.")] = None,
    positive: Annotated[str | None, option("Positive class, against all others.")] = None,
    split_column: Annotated[str | None, option("Column of the labels with train, val, test; default: folds by patient.")] = None,
    splits: Annotated[Path | None, option("Patho-Bench k=all.tsv with columns fold_0, fold_1, ...", exists=True)] = None,
    compare: Annotated[Path | None, option("A second embedding: adds the paired difference.", exists=True)] = None,
    include_seen: Annotated[bool, option("Test on slides that pretraining saw too (optimistic).", "--include-seen")] = False,
    compare_model: Annotated[
        Path | None,
        option("RUN/model of that second embedding: encodes its texts for retrieval and zeroshot.", panel=_INPUTS, exists=True),
    ] = None,
    reports: Annotated[
        Path | None, option("Reports: those of pretraining for the leak scan; or what to retrieve.", panel=_INPUTS, exists=True)
    ] = None,
    report_embeddings: Annotated[
        Path | None, option("Retrieval: report vectors, where pretraining used such.", panel=_INPUTS, exists=True)
    ] = None,
    model: Annotated[Path | None, option("RUN/model: encodes texts for retrieval and zeroshot.", panel=_INPUTS, exists=True)] = None,
    prompts: Annotated[Path | None, option("Zeroshot: JSON or TOML, class -> list of prompts.", panel=_INPUTS, exists=True)] = None,
) -> None:
    """Measure slide embeddings: subtype, recognition, mutation, retrieval, zeroshot."""
    from .embedding import Embeddings
    from .evaluation import evaluate
    from .report import evaluation_page

    if labels is None and task != "retrieval":
        raise ConfigError(f"--task {task} needs --labels TABLE")
    rows: Any = labels
    text: Any = None
    compare_text: Any = None
    if task in ("retrieval", "zeroshot"):
        from .embedding import prompt_vectors, report_rows

        if compare and not compare_model:
            raise ConfigError(f"--task {task} needs --compare-model RUN/model to encode the texts for --compare")

        def read(model: Path | None) -> Any:
            return report_rows(reports, report_embeddings, model) if task == "retrieval" else (labels, prompt_vectors(prompts, model))

        rows, text = read(model)
        compare_text = read(compare_model)[1] if compare else None
    result = evaluate(
        Embeddings.load(embeddings),
        rows,
        task=task,
        columns=column or (),
        config=EvalConfig(**knobs[EvalConfig]),
        positive=positive,
        split_column=split_column,
        splits=splits,
        compare=Embeddings.load(compare) if compare else None,
        include_seen=include_seen,
        reports=reports,
        text=text,
        compare_text=compare_text,
    )
    with hold(out):
        result.save(out)
        maps = (embeddings if embeddings.is_dir() else embeddings.parent) / "heatmaps"
        pictures = {path.stem: path for kind in ("codewords", "contributions") for path in sorted((maps / kind).glob("*.png"))}
        evaluation_page(result, out / "report.html", command=shlex.join(["dreslcl", *sys.argv[1:]]), pictures=pictures)
    for warning in result.warnings:
        log.warning("warning: %s", warning)
    print_table(*result.table())
    print(f"report: {out / 'report.html'}")


@command(panel="Start here")
def demo(
    *,
    out: Out,
    slides: Annotated[int, option("Synthetic scans to draw.", min=12)] = 120,
    seed: Annotated[int, option("Seed of the data and of the training.")] = 0,
) -> None:
    """Draw a synthetic cohort and run all four steps on it: no data, no download, no GPU needed."""
    from .demo import run_demo
    from .report import evaluation_page

    results = run_demo(out, slides=slides, seed=seed)
    for task, result in results.items():
        evaluation_page(result, out / "eval" / task / "report.html", command=" ".join(["dreslcl", *sys.argv[1:]]))
    header, rows = results["subtype"].table()
    shown = [header.index(name) for name in ("AUROC", "macro-F1", "balanced accuracy")]
    rows = [row for result in results.values() for row in result.table()[1] if row[header.index("probe")] == "linear"]
    print("These data are synthetic: drawn tissue, made-up reports. The figures say that the path works, nothing about medicine.")
    print("embedding: trained slide vectors; mean-pool: trained tile features; compared: mean of the untrained encoder's tile features")
    print_table(["task", "features", *(header[i] for i in shown)], [[*row[:2], *(row[i] for i in shown)] for row in rows])
    print(f"report: {out / 'eval' / 'subtype' / 'report.html'}")


@command(panel="Help")
def encoders(
    names: Annotated[list[str] | None, typer.Argument(help="Names to describe; none: all are listed, without their parameters.")] = None,
    measure: Annotated[
        bool, option("Measure tiles/s here, with random weights (of dreslcl-tiny where no name is given).", "--measure")
    ] = False,
) -> None:
    """List the encoders that --encoder takes: feature width, input edge (px), context (tokens), parameters, speed."""
    from .encoder import TINY, describe_encoder, list_encoders

    chosen = names or ([TINY] if measure else list_encoders())
    rows = [describe_encoder(name, build=bool(names or measure), measure=measure) for name in chosen]
    units = {"width": "width", "image_px": "input px", "tokens": "context tokens"}
    units |= {"image_millions": "image 10⁶ parameters", "text_millions": "text 10⁶ parameters", "tiles_per_s": "tiles/s"}
    shown = {key: unit for key, unit in units.items() if key in rows[0]}
    cells = [[_number(row[key]) for key in shown] for row in rows]
    print_table(["encoder", *shown.values()], [[row["name"], *line] for row, line in zip(rows, cells)])
    if not names:
        print("and hf-hub:ORG/NAME or local-dir:FOLDER", file=sys.stderr)


def _number(value: int | float | None) -> str:
    return "?" if value is None else str(value) if isinstance(value, int) else f"{value:,.1f}"


def main() -> None:
    """The entry point of the `dreslcl` command: a mistake in the command is one line too."""
    try:
        code = app(standalone_mode=False)
    except typer.Abort:
        code = 130
    except DreslclError as error:  # before a command runs
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        code = 2
    except _UsageError as error:
        command = error.ctx.command_path if error.ctx else "dreslcl"
        message = error.format_message().rstrip(".").replace("Value error, ", "") or "no command given"
        print(f"{message}; see `{command} --help`", file=sys.stderr)
        code = 2
    sys.exit(code if isinstance(code, int) else 0)
