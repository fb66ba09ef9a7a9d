"""The command line: parse, call one function, print. Results go to stdout, progress and logs to stderr.

A setting's flag, type, default and help come from its place in config.py; `--config` reads the same settings from a file.
"""

import functools
import inspect
import logging
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

_INPUTS, _RUNNING = "More inputs", "Running"
_STOPPED = "stopped; what is done is kept: run the same command again to go on"
_STOPPED_IN = {
    "pretrain": "stopped; whole epochs are kept: run the same command again to go on",
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


def command(*configs: type, panel: str, only: str = "") -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command whose flags are its own parameters and the settings of `configs`; user errors end in one line.

    The function's parameter `knobs` receives the settings given in a file or on the command line, by configuration class and name.

    Args:
        only: names of the settings to offer; all without.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(function).parameters.values() if p.name != "knobs"]
        hints = get_type_hints(function, include_extras=True)
        parameters = [p.replace(annotation=hints[p.name]) for p in own]
        owner: dict[str, tuple[type, str]] = {}
        for config in configs:
            types: dict[str, Any] = get_type_hints(config)
            help_of = knob_help(config)
            for knob in (f for f in fields(config) if not only or f.name in only.split()):
                flag = _FLAGS.get((config.__name__, knob.name), knob.name)
                owner[flag] = (config, knob.name)
                text, kind, default = help_of[knob.name], types[knob.name], knob.default
                if isinstance(default, tuple):
                    text, kind, default = f"{text} Give it again for each.", list[int], list(default)
                parameters.append(_keyword(flag, kind, default, option(text, panel=_PANELS[config.__name__])))
        if configs and not only:
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
    held_out: Annotated[
        str | None,
        option("Slides, given like --exclude, for retrieval after each epoch; the best epoch's model is kept."),
    ] = None,
    preset: Annotated[
        Literal["paper", "tiny", "clip-b32"] | None, option("Start from known settings; --config and flags override them.")
    ] = None,
    features: FeatureFolder = None,
    report_embeddings: Annotated[
        Path | None, option("HDF5 or npz of report vectors by slide or patient id, in place of texts.", panel=_INPUTS, exists=True)
    ] = None,
    patients: Patients = None,
    tensorboard: Annotated[bool, option("Write TensorBoard events too.", "--tensorboard", panel=_RUNNING)] = False,
    dry_run: Annotated[bool, option("Print the cohort and what the run takes; train nothing.", "--dry-run", panel=_RUNNING)] = False,
) -> None:
    """Train tile encoder and aggregator against the reports; run again, it goes on after the last whole epoch."""
    from .trainer import pretrain as run

    settings = PRESETS[preset] if preset else RunConfig()
    settings = updated(settings, encoder=knobs[EncoderConfig], model=knobs[ModelConfig], train=knobs[TrainConfig])
    cohort = _cohort(work, features, patients).with_reports(reports, report_embeddings)
    cohort, _ = cohort.split(exclude, reports)
    cohort, validation = cohort.split(held_out, reports)
    for note in cohort.notes:
        log.info(note)
    folder = run(cohort, out, settings, held_out=validation, dry_run=dry_run, tensorboard=tensorboard)
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
    unreadable: dict[str, str] = {}
    return Cohort.of_features(find_features(features, unreadable if skip else None), patients=patients, unreadable=unreadable)


@command(TrainConfig, panel="Steps", only="tile_batch precision workers")
def embed(
    work: Annotated[Path | None, typer.Argument(help="Folder that `dreslcl tile` wrote; or use --features.")] = None,
    *,
    model: Annotated[
        Path | None, option("RUN/model of a pretraining. Without it a slide is the mean of its tile features.", exists=True)
    ] = None,
    out: Out,
    knobs: dict[type, dict[str, Any]],
    by: Annotated[Literal["slide", "patient"], option("One vector per slide, or the mean of a patient's slides.")] = "slide",
    layout: Annotated[Literal["trident", "clam", "stamp", "patho-bench"], option("Also write files as this tool reads them.")] = "trident",
    tile_features: Annotated[bool, option("Also write each slide's tile features, in that layout.", "--tile-features")] = False,
    features: FeatureFolder = None,
    patients: Patients = None,
    encoder: Annotated[str, option("Without --model: the tile encoder, as in pretrain.", panel=_INPUTS)] = EncoderConfig.name,
    pretrained: Annotated[
        str | None, option("Without --model: OpenCLIP's tag of that encoder's weights, or a weights file.", panel=_INPUTS)
    ] = None,
    force: Annotated[bool, option("Embed slides again that are done.", "--force", panel=_RUNNING)] = False,
) -> None:
    """Encode every tile of every slide and write one vector per slide."""
    from .embedding import embed as run

    cohort = _cohort(work, features, patients, skip=True)
    result = run(
        cohort,
        out,
        model=model,
        encoder=None if model else EncoderConfig(encoder, pretrained),
        settings=TrainConfig(**knobs[TrainConfig]),
        by=by,
        layout=layout,
        tile_features=tile_features,
        force=force,
    )
    say(f"{len(result)} vectors of width {result.vectors.shape[1]}: {out / 'embeddings.h5'}")
    _raise_failed(result.failed, len(cohort) + len(cohort.unreadable))


def _raise_failed(failed: Any, total: int) -> None:
    for slide, why in failed.items():
        raise DreslclError(f"{len(failed)} of {total} slides failed, the others are done; {slide}: {why}")


@command(TrainConfig, panel="Steps", only="tile_batch precision workers")
def heatmap(
    work: Annotated[Path, typer.Argument(help="Folder that `dreslcl tile` wrote.", exists=True, file_okay=False)],
    *,
    embeddings: Annotated[Path, option("Folder that `dreslcl embed` wrote with a model: EMB.", exists=True)],
    out: Annotated[Path | None, option("Folder; default: EMB/heatmaps, which `eval` shows.", "--out", "-o", file_okay=False)] = None,
    knobs: dict[type, dict[str, Any]],
    text: Annotated[str | None, option("Also map each tile's contribution to the similarity with this text.")] = None,
    labels: Annotated[
        Path | None, option("Or its contribution to the slide's class: table slide_id or patient_id, and label.", exists=True)
    ] = None,
    column: Annotated[str, option("Column of that table.")] = "subtype",
    force: Annotated[bool, option("Draw maps again that are there.", "--force", panel=_RUNNING)] = False,
) -> None:
    """Draw over each slide which codeword its tiles are, and what each adds to a score; PNG and QuPath GeoJSON."""
    from .formats import Embeddings
    from .heatmaps import draw_heatmaps

    embedded, cohort = Embeddings.load(embeddings), _cohort(work, None, None)
    out = out or (embeddings if embeddings.is_dir() else embeddings.parent) / "heatmaps"
    settings = TrainConfig(**knobs[TrainConfig])
    failed = draw_heatmaps(cohort, embedded, out, text=text, labels=labels, column=column, settings=settings, force=force)
    say(f"maps: {out}")
    _raise_failed(failed, len(cohort))


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
    split: Annotated[
        str | None,
        option("Column of the labels with train, val, test; or a Patho-Bench k=all.tsv. Default: folds by patient.", metavar="COLUMN|FILE"),
    ] = None,
    compare: Annotated[Path | None, option("A second embedding: adds the paired difference.", exists=True)] = None,
    include_seen: Annotated[bool, option("Test on slides that pretraining saw too (optimistic).", "--include-seen")] = False,
    reports: Annotated[
        Path | None, option("Reports: those of pretraining for the leak scan; or what to retrieve.", panel=_INPUTS, exists=True)
    ] = None,
    report_embeddings: Annotated[
        Path | None, option("Retrieval: report vectors, where pretraining used such.", panel=_INPUTS, exists=True)
    ] = None,
    prompts: Annotated[Path | None, option("Zeroshot: JSON or TOML, class -> list of prompts.", panel=_INPUTS, exists=True)] = None,
) -> None:
    """Measure slide embeddings: subtype, recognition, mutation, retrieval, zeroshot."""
    from .evaluation import evaluate
    from .formats import Embeddings
    from .report import evaluation_page, in_words

    table = (report_embeddings or reports) if task == "retrieval" else labels
    if table is None:
        needed = "--reports TABLE or --report-embeddings FILE" if task == "retrieval" else "--labels TABLE"
        raise ConfigError(f"--task {task} needs {needed}")
    first = Embeddings.load(embeddings)
    result = evaluate(
        (first, Embeddings.load(compare)) if compare else first,
        table,
        task,
        columns=dict.fromkeys(column or ["subtype" if task == "zeroshot" else task], positive) if positive else column or (),
        split=split,
        texts=prompts if task == "zeroshot" else reports,
        include_seen=include_seen,
        config=EvalConfig(**knobs[EvalConfig]),
    )
    with hold(out):
        result.save(out)
        maps = (embeddings if embeddings.is_dir() else embeddings.parent) / "heatmaps"
        pictures = {path.stem: path for kind in ("codewords", "contributions") for path in sorted((maps / kind).glob("*.png"))}
        evaluation_page(result, out / "report.html", command=shlex.join(["dreslcl", *sys.argv[1:]]), pictures=pictures)
    for warning in result.warnings:
        log.warning("warning: %s", warning)
    print_table(*result.table())
    for outcome in result.outcomes:
        print(in_words(outcome, task))
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
) -> None:
    """List the encoders that --encoder takes: feature width, input edge (px), context (tokens), parameters."""
    from .encoder import describe_encoder, list_encoders

    rows = [describe_encoder(name, build=bool(names)) for name in names or list_encoders()]
    units = {"width": "width", "image_px": "input px", "tokens": "context tokens"}
    units |= {"image_millions": "image 10⁶ parameters", "text_millions": "text 10⁶ parameters"}
    shown = {key: unit for key, unit in units.items() if key in rows[0]}
    print_table(["encoder", *shown.values()], [[row["name"], *(_number(row[key]) for key in shown)] for row in rows])
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
