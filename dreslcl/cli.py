"""The command line: parse, call one function, print. Results go to stdout, progress and logs to stderr.

A knob's flag, type, default and help come from its place in config.py. Exit codes: 0 done, 1 a failure (one line on
stderr says what), 2 a mistake in the command, 130 stopped by Ctrl-C.
"""

import functools
import inspect
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from . import __version__
from .config import PRESETS, EncoderConfig, EvalConfig, ModelConfig, RunConfig, TileConfig, TrainConfig, knob_help, updated
from .errors import ConfigError, DreslclError

app = typer.Typer(
    help="Learn slide representations from whole-slide images and their pathology reports (DRE-SLCL, arXiv 2511.05034).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
log = logging.getLogger(__name__)

_UsageError = typer.BadParameter.__mro__[1]  # typer brings its own click, and gives this class no public name
_FLAGS = {("EncoderConfig", "name"): "encoder"}  # a knob whose flag says more than its field
_PANELS = {
    "TileConfig": "Tiles",
    "EncoderConfig": "Encoder",
    "ModelConfig": "Aggregator",
    "TrainConfig": "Training",
    "EvalConfig": "Protocol",
}

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.", file_okay=False)]
Workers = Annotated[int, typer.Option(help="Threads that read; 0: one per CPU, at most 8.", min=0)]
FeatureFolder = Annotated[
    Path | None,
    typer.Option(
        "--features", help="Folder of tile features made elsewhere (TRIDENT, CLAM or STAMP layout), in place of pixels.", exists=True
    ),
]
Patients = Annotated[
    Path | None, typer.Option(help="Table slide_id, patient_id; default: TCGA barcodes, else the slide itself.", exists=True)
]


def command(*configs: type, panel: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command whose flags are its own parameters and the knobs of `configs`; user errors end in one line.

    The function's last parameter `knobs` receives the knobs given on the command line, by configuration class and name.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(function).parameters.values() if p.name != "knobs"]
        hints = get_type_hints(function, include_extras=True)
        parameters = [p.replace(annotation=hints[p.name]) for p in own]
        owner: dict[str, tuple[type, str]] = {}
        for config in configs:
            types, help_of = get_type_hints(config), knob_help(config)
            for knob in fields(config):
                flag = _FLAGS.get((config.__name__, knob.name), knob.name)
                owner[flag] = (config, knob.name)
                option = typer.Option(help=help_of[knob.name], rich_help_panel=_PANELS[config.__name__])
                kind = list[int] if types[knob.name] == tuple[int, ...] else types[knob.name]
                default = list(knob.default) if isinstance(knob.default, tuple) else knob.default
                parameters.append(
                    inspect.Parameter(flag, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])
                )

        @functools.wraps(function)
        def run(ctx: Any, **given: Any) -> None:
            knobs: dict[type, dict[str, Any]] = {config: {} for config in configs}
            for flag, (config, name) in owner.items():
                value = given.pop(flag)
                if str(ctx.get_parameter_source(flag)).endswith("COMMANDLINE"):
                    knobs[config][name] = tuple(value) if isinstance(value, list) else value
            try:
                function(**given, **({"knobs": knobs} if configs else {}))
            except DreslclError as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
                raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from error
            except KeyboardInterrupt as error:
                print(f"\nstopped; what is done is kept: run the same command again{_go_on(function.__name__)} to go on", file=sys.stderr)
                raise typer.Exit(130) from error

        context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
        run.__signature__ = inspect.Signature([context, *sorted(parameters, key=lambda p: p.kind)])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in [context, *parameters]}
        app.command(function.__name__.rstrip("_"), rich_help_panel=panel)(run)
        return function

    return register


def _go_on(name: str) -> str:
    return " with --resume" if name == "pretrain" else ""


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=lambda on: _version(on))
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings and errors on stderr.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Debugging messages too.")] = False,
) -> None:
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING, force=True)
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # a damaged scan is told in one line of our own
    logging.getLogger("dreslcl").setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)


def _version(on: bool) -> bool:
    if on:
        print(f"dreslcl {__version__}")
        raise typer.Exit
    return on


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
    out: Out,
    knobs: dict[type, dict[str, Any]],
    mpp_csv: Annotated[
        Path | None, typer.Option(help="Table slide_id, mpp: level-0 resolution (µm/px) in place of what scans say.", exists=True)
    ] = None,
    overrides: Annotated[
        Path | None,
        typer.Option(
            help="Table slide_id and any of mpp, threshold, min_tissue, max_tiles, drop_pen, min_sharpness, mask_mpp.", exists=True
        ),
    ] = None,
    tissue_geojson: Annotated[
        Path | None, typer.Option(help="Folder of QuPath annotations <slide_id>.geojson, in place of our mask.", exists=True)
    ] = None,
    coords: Annotated[
        Path | None, typer.Option(help="Folder of coordinates that TRIDENT or CLAM wrote, in place of our grid.", exists=True)
    ] = None,
    pack: Annotated[bool, typer.Option("--pack", help="Also write each slide's tiles as one BigTIFF, for slow network disks.")] = False,
    workers: Workers = 0,
    shard: Annotated[str | None, typer.Option(help="I/N: do every N-th slide from the I-th (I from 0); default: as torchrun says.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Do slides again that are done.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what is there and would be done; write nothing.")] = False,
) -> None:
    """Find the tissue tiles of each scan: grids, overlays and slides.csv."""
    from .tiles import tile_slides

    rows = tile_slides(
        slides,
        out,
        TileConfig(**knobs[TileConfig]),
        workers=workers,
        force=force,
        dry_run=dry_run,
        shard=_shard(shard),
        mpp_csv=mpp_csv,
        overrides=overrides,
        tissue_geojson=tissue_geojson,
        coords=coords,
        pack=pack,
    )
    if dry_run:
        shown = ["slide_id", "status", "width", "height", "levels", "mpp", "mpp_source", "tiles", "error"]
        print_table(shown, [[str(row.get(c, "")) for c in shown] for row in rows])
    counts = {status: sum(row["status"] == status for row in rows) for status in ("ok", "empty", "error")}
    total = sum(int(row["tiles"] or 0) for row in rows)
    print(f"{len(rows)} slides: {counts['ok']} ok with {total:,} tiles, {counts['empty']} empty, {counts['error']} failed")
    if counts["error"]:
        for row in [r for r in rows if r["status"] == "error"][:5]:
            print(f"  {row['slide_id']}: {row['error']}", file=sys.stderr)
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
    out: Out,
    knobs: dict[type, dict[str, Any]],
    work: Annotated[Path | None, typer.Argument(help="Folder that `dreslcl tile` wrote; or use --features.")] = None,
    reports: Annotated[
        Path | None,
        typer.Option(help="Table slide_id and/or patient_id, report (CSV, TSV); TCGA_Reports.csv; or HistGen JSON.", exists=True),
    ] = None,
    report_embeddings: Annotated[
        Path | None, typer.Option(help="HDF5 or npz of report vectors by slide or patient id, in place of texts.", exists=True)
    ] = None,
    features: FeatureFolder = None,
    patients: Patients = None,
    exclude: Annotated[
        str | None,
        typer.Option(help="Keep slides out of pretraining: a file of slide or patient ids, or column=value of the reports table."),
    ] = None,
    val_column: Annotated[
        str | None,
        typer.Option(help="column=value of the reports table: slides for held-out retrieval after each epoch; the best epoch is kept."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file as RUN/config.toml; flags override it.", exists=True)] = None,
    preset: Annotated[
        Literal["paper", "tiny", "clip-b32"] | None, typer.Option(help="Start from known settings; --config and flags override them.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last whole epoch.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the cohort, memory, disk and time forecast; train nothing.")] = False,
) -> None:
    """Train the tile encoder and the residual encoder against the reports."""
    from .trainer import pretrain as run

    settings = PRESETS[preset] if preset else RunConfig()
    if config:
        settings = RunConfig.load(config, settings)
    settings = updated(settings, encoder=knobs[EncoderConfig], model=knobs[ModelConfig], train=knobs[TrainConfig])
    cohort = _cohort(work, features, patients).with_reports(reports, report_embeddings)
    cohort, _ = cohort.split(exclude, reports)
    cohort, held_out = cohort.split(val_column, reports)
    for note in cohort.notes:
        log.info(note)
    folder = run(cohort, out, settings, held_out=held_out, resume=resume, dry_run=dry_run)
    if not dry_run:
        print(f"model: {folder}")


def _cohort(work: Path | None, features: Path | None, patients: Path | None) -> Any:
    from .cohort import Cohort
    from .features import find_features

    if (work is None) == (features is None):
        raise ConfigError("give either the folder that `dreslcl tile` wrote, or --features FOLDER")
    return Cohort.load(work, patients=patients) if work else Cohort.of_features(find_features(features), patients=patients)


@command(panel="Steps")
def embed(
    out: Out,
    work: Annotated[Path | None, typer.Argument(help="Folder that `dreslcl tile` wrote; or use --features.")] = None,
    model: Annotated[
        Path | None, typer.Option(help="RUN/model of a pretraining. Without it a slide is the mean of its tile features.", exists=True)
    ] = None,
    encoder: Annotated[str, typer.Option(help="Tile encoder of that mean, as in pretrain.")] = EncoderConfig.name,
    pretrained: Annotated[str | None, typer.Option(help="OpenCLIP tag of the encoder's weights.")] = None,
    features: FeatureFolder = None,
    patients: Patients = None,
    by: Annotated[Literal["slide", "patient"], typer.Option(help="One vector per slide, or the mean of a patient's slides.")] = "slide",
    tile_batch: Annotated[int, typer.Option(help="Tiles in one pass of the encoder.", min=1)] = TrainConfig.tile_batch,
    precision: Annotated[Literal["auto", "fp32", "bf16"], typer.Option(help="Arithmetic of the tile encoder.")] = "auto",
    workers: Workers = 0,
    layout: Annotated[
        Literal["trident", "clam", "stamp", "patho-bench"], typer.Option(help="Also write files as this tool reads them.")
    ] = "trident",
    tile_features: Annotated[bool, typer.Option("--tile-features", help="Also write each slide's tile features, in that layout.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Embed slides again that are done.")] = False,
) -> None:
    """Encode every tile of every slide and write one vector per slide."""
    from .embedding import embed as run

    result = run(
        _cohort(work, features, patients),
        out,
        model=model,
        encoder=None if model else EncoderConfig(encoder, pretrained),
        batch=tile_batch,
        precision=precision,
        workers=workers or min(8, os.cpu_count() or 1),
        by=by,
        layout=layout,
        tile_features=tile_features,
        force=force,
    )
    print(f"{len(result)} vectors of width {result.vectors.shape[1]}: {out / 'embeddings.h5'}")


@command(EvalConfig, panel="Steps")
def eval_(
    embeddings: Annotated[Path, typer.Argument(help="Folder (or embeddings.h5) that `dreslcl embed` wrote.", exists=True)],
    task: Annotated[Literal["subtype", "recognition", "mutation", "retrieval", "zeroshot"], typer.Option(help="What to measure.")],
    out: Out,
    knobs: dict[type, dict[str, Any]],
    labels: Annotated[Path | None, typer.Option(help="Table slide_id or patient_id, and label columns.", exists=True)] = None,
    column: Annotated[
        list[str] | None, typer.Option(help="Label column; give it again for several genes. Default: the task's name.")
    ] = None,
    positive: Annotated[str | None, typer.Option(help="Positive class, against all others.")] = None,
    split_column: Annotated[str | None, typer.Option(help="Column of the labels with train, val, test; default: folds by patient.")] = None,
    splits: Annotated[Path | None, typer.Option(help="Patho-Bench k=all.tsv with columns fold_0, fold_1, ...", exists=True)] = None,
    compare: Annotated[Path | None, typer.Option(help="A second embedding: adds the paired difference.", exists=True)] = None,
    include_seen: Annotated[bool, typer.Option("--include-seen", help="Test on slides that pretraining saw too (optimistic).")] = False,
    reports: Annotated[
        Path | None, typer.Option(help="Reports: those of pretraining for the leak scan; or what to retrieve.", exists=True)
    ] = None,
    report_embeddings: Annotated[
        Path | None, typer.Option(help="Retrieval: report vectors, where pretraining used such.", exists=True)
    ] = None,
    model: Annotated[Path | None, typer.Option(help="RUN/model: encodes texts for retrieval and zeroshot.", exists=True)] = None,
    prompts: Annotated[Path | None, typer.Option(help="Zeroshot: JSON or TOML, class -> list of prompts.", exists=True)] = None,
) -> None:
    """Measure slide embeddings: subtype, recognition, mutation, retrieval, zeroshot."""
    from .embedding import Embeddings
    from .evaluation import evaluate
    from .report import evaluation_page

    if labels is None and task != "retrieval":
        raise ConfigError(f"--task {task} needs --labels TABLE")
    rows, text = labels, None
    if task in ("retrieval", "zeroshot"):
        from .embedding import prompt_vectors, report_rows

        rows, text = report_rows(reports, report_embeddings, model) if task == "retrieval" else (labels, prompt_vectors(prompts, model))
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
        reports=reports if task != "retrieval" else None,
        text=text,
    )
    result.save(out)
    evaluation_page(result, out / "report.html", command=" ".join(["dreslcl", *sys.argv[1:]]))
    for warning in result.warnings:
        log.warning("warning: %s", warning)
    print_table(*result.table())
    print(f"report: {out / 'report.html'}")


@command(panel="Start here")
def demo(
    out: Out,
    slides: Annotated[int, typer.Option(help="Synthetic scans to draw.", min=12)] = 120,
    seed: Annotated[int, typer.Option(help="Seed of the data and of the training.")] = 0,
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
        bool, typer.Option("--measure", help="Measure tiles/s here, with random weights (of dreslcl-tiny where no name is given).")
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
    except _UsageError as error:
        command = error.ctx.command_path if error.ctx else "dreslcl"
        print(f"{error.format_message().rstrip('.') or 'no command given'}; see `{command} --help`", file=sys.stderr)
        code = 2
    sys.exit(code if isinstance(code, int) else 0)
