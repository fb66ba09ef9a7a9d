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
from .config import PRESETS, TABLES, EncoderConfig, EvalConfig, RunConfig, TileConfig, TrainConfig, read_settings, updated

app = typer.Typer(
    help="Learn slide representations from whole-slide images and their pathology reports (DRE-SLCL, arXiv 2511.05034).",
    epilog="Exit codes: 0 done · 1 a failure, one line says which · 2 a mistake in the command · 130 stopped by Ctrl-C",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
log = logging.getLogger(__name__)

_UsageError: Any = typer.BadParameter.__mro__[1]  # typer brings its own click, and gives this class no public name
_OFTEN = set("size mpp min_tissue encoder pretrained tune text epochs batch tiles bank_share encoder_lr".split())
_PANELS = {"tile": "Tiles", "encoder": "Encoder", "model": "Aggregator", "train": "Training", "eval": "Protocol"}
_STOPPED = {
    "pretrain": "stopped; whole epochs are kept: run the same command again to go on",
    "demo": "stopped; delete the folder of --out, or choose another, and run it again",
}

Chosen = dict[str, dict[str, Any]]  # table of config.py -> what the file and the flags set in it


def option(text: str, *names: str, panel: str | None = None, **rest: Any) -> Any:
    """A typer option in a panel of the help."""
    return typer.Option(*names, help=text, rich_help_panel=panel, **rest)


existing = functools.partial(option, exists=True)  # a file or folder that must be there
more = functools.partial(option, panel="More inputs")
given = functools.partial(more, exists=True)
running = functools.partial(option, panel="Running")

Out = Annotated[Path, option("Folder for the results.", "--out", "-o", file_okay=False)]
Work = Annotated[Path | None, typer.Argument(help="Folder that `dreslcl tile` wrote; or use --features.")]
Features = Annotated[
    Path | None,
    given("Folder of tile features made elsewhere (TRIDENT, CLAM or STAMP layout), in place of pixels.", "--features", file_okay=False),
]
Patients = Annotated[Path | None, given("Table slide_id, patient_id; default: TCGA barcodes, else the slide itself.")]


def command(*tables: str, panel: str, only: str = "") -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command whose flags are its own parameters and the settings of some tables, or `only` some of these by name.

    The function's parameter `settings` receives those that a file or the command line sets.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        own = [p for name, p in inspect.signature(function).parameters.items() if name != "settings"]
        parameters = [p.replace(annotation=hints[p.name]) for p in own]
        place: dict[str, tuple[str, str]] = {}  # flag -> table and name of its setting

        def add(flag: str, kind: Any, default: Any, how: Any) -> None:
            parameters.append(inspect.Parameter(flag, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, how]))

        kinds = {part: get_type_hints(TABLES[part]) for part in tables}
        offered = [(part, one) for part in tables for one in fields(TABLES[part]) if not only or one.name in only.split()]
        flags = [("encoder" if (part, one.name) == ("encoder", "name") else one.name, part, one) for part, one in offered]
        for flag, part, one in sorted(flags, key=lambda item: item[0] not in _OFTEN):
            place[flag] = (part, one.name)
            text, group = one.metadata["help"], "Settings that most people change" if flag in _OFTEN else f"More: {_PANELS[part].lower()}"
            if isinstance(one.default, tuple):
                add(flag, list[int], list(one.default), option(f"{text} Give it again for each.", panel=group))
            else:
                add(flag, kinds[part][one.name], one.default, option(text, panel=group))
        if tables and not only:
            text = f"TOML file of settings, tables {', '.join(tables)}; flags override it."
            add("config", Path | None, None, running(text, exists=True))

        @functools.wraps(function)
        def run(ctx: Any, **values: Any) -> None:
            file = values.pop("config", None)
            settings = read_settings(file) if file else {part: {} for part in tables}
            for flag, (part, name) in place.items():
                value = values.pop(flag)
                if str(ctx.get_parameter_source(flag)).endswith("COMMANDLINE"):
                    settings[part][name] = tuple(value) if isinstance(value, list) else value
            function(**values, **({"settings": {part: settings[part] for part in tables}} if tables else {}))

        context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
        run.__signature__ = inspect.Signature([context, *sorted(parameters, key=lambda p: p.kind)])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in [context, *parameters]}
        app.command(function.__name__.rstrip("_"), rich_help_panel=panel)(run)
        return function

    return register


class _Stderr(logging.Handler):
    """Prints to sys.stderr as it is at the moment: a progress bar puts itself in its place, so that lines go above it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def _version(on: bool) -> bool:
    if on:
        print(f"dreslcl {__version__}")
        raise typer.Exit
    return on


@app.callback()
def _common(
    version: Annotated[bool, option("Print the version and exit.", "--version", is_eager=True, callback=_version)] = False,
    quiet: Annotated[bool, option("Only warnings and errors on stderr.", "--quiet", "-q")] = False,
    verbose: Annotated[bool, option("Debugging messages too.", "--verbose", "-v")] = False,
) -> None:
    logging.basicConfig(handlers=[_Stderr()], format="%(message)s", level=logging.WARNING, force=True)
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # a damaged scan is told in one line of our own
    quiet = quiet or rank_and_world()[0] > 0  # of several ranks one speaks
    logging.getLogger("dreslcl").setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
    logging.captureWarnings(True)  # what libraries warn of is for us to mend, not for the user
    logging.getLogger("py.warnings").setLevel(logging.WARNING if verbose else logging.ERROR)


def say(line: str) -> None:
    """Print a line of the result, once where several ranks run."""
    if rank_and_world()[0] == 0:
        print(line)


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """A table on stdout: rich on a terminal, tab-separated text elsewhere."""
    if not sys.stdout.isatty():
        print("\n".join("\t".join(row) for row in [header, *rows]))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


@command("tile", panel="Steps")
def tile(
    slides: Annotated[Path, typer.Argument(help="Scan, or folder of scans (searched with its subfolders).", exists=True)],
    *,
    out: Out,
    settings: Chosen,
    pack: Annotated[bool, option("Also write each slide's tiles as one BigTIFF, for slow network disks.", "--pack")] = False,
    overrides: Annotated[
        Path | None, given("Table slide_id and any of mpp (of level 0), threshold, min_tissue, max_tiles, drop_pen, min_sharpness.")
    ] = None,
    tissue_geojson: Annotated[Path | None, given("Folder of QuPath annotations <slide_id>.geojson, in place of our mask.")] = None,
    coords: Annotated[Path | None, given("Folder of coordinates that TRIDENT or CLAM wrote, in place of our grid.")] = None,
    workers: Annotated[int, running("Threads that read; 0: one per CPU, at most 8.", min=0)] = 0,
    shard: Annotated[str | None, running("I/N: do every N-th slide from the I-th (I from 0); default: as torchrun says.")] = None,
    check: Annotated[Literal["sample", "full"] | None, running("Decode a sample of the scan's stored tiles, or all: finds damage.")] = None,
    dry_run: Annotated[bool, running("Print what is there and would be done; write nothing.", "--dry-run")] = False,
) -> None:
    """Find the tissue tiles of each scan: grids, overlays and slides.csv."""
    from .tiles import Given, tile_slides

    inputs, config = Given(overrides, tissue_geojson, coords), TileConfig(**settings["tile"])
    how = {"shard": _shard(shard), "write": "nothing" if dry_run else "packs" if pack else "grids", "check": check or ""}
    rows = tile_slides(slides, out, config, given=inputs, workers=workers, **how)
    if dry_run:
        shown = "slide_id status width height levels regions mpp mpp_source tiles warning error".split()
        print_table(shown, [[str(row.get(c, "")) for c in shown] for row in rows])
    ok, empty, failed = (sum(row["status"] == status for row in rows) for status in ("ok", "empty", "error"))
    total = sum(int(row["tiles"] or 0) for row in rows)
    print(f"{len(rows)} slides: {ok} ok with {total:,} tiles, {empty} empty, {failed} failed")
    if failed:
        raise DreslclError(f"{failed} of {len(rows)} slides failed; their rows in {out / 'slides.csv'} say why")


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit()):
        raise ConfigError(f"--shard is I/N, like 0/4; got {text!r}")
    return int(index), int(count)


@command("encoder", "model", "train", panel="Steps")
def pretrain(
    work: Work = None,
    *,
    reports: Annotated[Path | None, existing("Table slide_id or patient_id, report (CSV, TSV); TCGA_Reports.csv; HistGen JSON.")] = None,
    out: Out,
    settings: Chosen,
    exclude: Annotated[str | None, option("Slides to keep out: a file of slide or patient ids, or column=value of the reports.")] = None,
    held_out: Annotated[str | None, option("Slides, given likewise, for retrieval after each epoch; the best epoch is kept.")] = None,
    preset: Annotated[Literal["paper", "tiny", "clip-b32"] | None, option("Known settings; --config and flags override them.")] = None,
    features: Features = None,
    report_embeddings: Annotated[Path | None, given("HDF5 or npz of report vectors by slide or patient id, in place of texts.")] = None,
    patients: Patients = None,
    tensorboard: Annotated[bool, running("Write TensorBoard events too.", "--tensorboard")] = False,
    dry_run: Annotated[bool, running("Print the cohort and what the run takes; train nothing.", "--dry-run")] = False,
) -> None:
    """Train tile encoder and aggregator against the reports; run again, it goes on after the last whole epoch."""
    from .trainer import pretrain as run

    config = updated(PRESETS[preset] if preset else RunConfig(), **settings)
    cohort, _ = _cohort(work, features, patients).with_reports(reports, report_embeddings).split(exclude, reports)
    cohort, validation = cohort.split(held_out, reports)
    for note in cohort.notes:
        log.info(note)
    folder = run(cohort, out, config, held_out=validation, dry_run=dry_run, tensorboard=tensorboard)
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


@command("train", panel="Steps", only="tile_batch precision workers")
def embed(
    work: Work = None,
    *,
    model: Annotated[Path | None, existing("RUN/model of a pretraining. Without it a slide is the mean of its tile features.")] = None,
    out: Out,
    settings: Chosen,
    by: Annotated[Literal["slide", "patient"], option("One vector per slide, or one for all tiles of a patient's slides.")] = "slide",
    layout: Annotated[Literal["trident", "clam", "stamp", "patho-bench"], option("Also write files as this tool reads them.")] = "trident",
    tile_features: Annotated[bool, option("Also write each slide's tile features, in that layout.", "--tile-features")] = False,
    features: Features = None,
    patients: Patients = None,
    encoder: Annotated[str, more("Without --model: the tile encoder, as in pretrain.")] = EncoderConfig.name,
    pretrained: Annotated[str | None, more("Without --model: a tag of that encoder's weights, or a weights file.")] = None,
    force: Annotated[bool, running("Embed slides again that are done.", "--force")] = False,
) -> None:
    """Encode every tile of every slide and write one vector per slide."""
    from .embedding import embed as run

    cohort = _cohort(work, features, patients, skip=True)
    towers = None if model else EncoderConfig(encoder, pretrained)
    files = {"by": by, "layout": layout, "tile_features": tile_features}
    result = run(cohort, out, model=model, encoder=towers, settings=TrainConfig(**settings["train"]), force=force, **files)
    say(f"{len(result)} vectors of width {result.vectors.shape[1]}: {out / 'embeddings.h5'}")
    _raise_failed(result.failed, len(cohort) + len(cohort.unreadable))


def _raise_failed(failed: Any, total: int) -> None:
    for slide, why in failed.items():
        raise DreslclError(f"{len(failed)} of {total} slides failed, the others are done; {slide}: {why}")


def _maps(embeddings: Path) -> Path:
    """Where the heatmaps of embeddings are, unless told otherwise."""
    return (embeddings if embeddings.is_dir() else embeddings.parent) / "heatmaps"


@command("train", panel="Steps", only="tile_batch precision workers")
def heatmap(
    work: Annotated[Path, typer.Argument(help="Folder that `dreslcl tile` wrote.", exists=True, file_okay=False)],
    *,
    embeddings: Annotated[Path, existing("Folder that `dreslcl embed` wrote with a model: EMB.")],
    out: Annotated[Path | None, option("Folder; default: EMB/heatmaps, which `eval` shows.", "--out", "-o", file_okay=False)] = None,
    settings: Chosen,
    text: Annotated[str | None, option("Also map each tile's contribution to the similarity with this text.")] = None,
    labels: Annotated[Path | None, existing("Or its contribution to the slide's class: table slide_id or patient_id, and label.")] = None,
    column: Annotated[str, option("Column of that table.")] = "subtype",
    force: Annotated[bool, running("Draw maps again that are there.", "--force")] = False,
) -> None:
    """Draw over each slide which codeword its tiles are, and what each adds to a score; PNG and QuPath GeoJSON."""
    from .formats import Embeddings
    from .heatmaps import draw_heatmaps

    embedded, cohort, out, config = Embeddings.load(embeddings), _cohort(work, None, None), out or _maps(embeddings), settings["train"]
    score = {"text": text, "labels": labels, "column": column}
    failed = draw_heatmaps(cohort, embedded, out, settings=TrainConfig(**config), force=force, **score)
    say(f"maps: {out}")
    _raise_failed(failed, len(cohort))


@command("eval", panel="Steps")
def eval_(
    embeddings: Annotated[Path, typer.Argument(help="Folder (or embeddings.h5) that `dreslcl embed` wrote.", exists=True)],
    *,
    labels: Annotated[Path | None, existing("Table slide_id or patient_id, and label columns.")] = None,
    task: Annotated[Literal["subtype", "recognition", "mutation", "retrieval", "zeroshot"], option("What to measure.")],
    out: Out,
    settings: Chosen,
    column: Annotated[list[str] | None, option("Label column; give it again for several genes. Default: the task's name.")] = None,
    positive: Annotated[str | None, option("Positive class, against all others.")] = None,
    split: Annotated[
        str | None,
        option("Column of the labels with train, val, test; or a Patho-Bench k=all.tsv. Default: folds by patient.", metavar="COLUMN|FILE"),
    ] = None,
    compare: Annotated[Path | None, existing("A second embedding: adds the paired difference.")] = None,
    include_seen: Annotated[bool, option("Test on slides that pretraining saw too (optimistic).", "--include-seen")] = False,
    reports: Annotated[Path | None, given("Reports: those of pretraining for the leak scan; or what to retrieve.")] = None,
    report_embeddings: Annotated[Path | None, given("Retrieval: report vectors, where pretraining used such.")] = None,
    prompts: Annotated[Path | None, given("Zeroshot: JSON or TOML, class -> list of prompts.")] = None,
) -> None:
    """Measure slide embeddings: subtype, recognition, mutation, retrieval, zeroshot."""
    from .evaluation import evaluate
    from .formats import Embeddings
    from .report import evaluation_page, in_words

    table = (report_embeddings or reports) if task == "retrieval" else labels
    if table is None:
        needed = "--reports TABLE or --report-embeddings FILE" if task == "retrieval" else "--labels TABLE"
        raise ConfigError(f"--task {task} needs {needed}")
    loaded = tuple(map(Embeddings.load, [embeddings, compare] if compare else [embeddings]))
    columns = dict.fromkeys(column or ["subtype" if task == "zeroshot" else task], positive) if positive else column or ()
    protocol = {"split": split, "include_seen": include_seen, "config": EvalConfig(**settings["eval"])}
    result = evaluate(loaded, table, task, columns=columns, texts=prompts if task == "zeroshot" else reports, **protocol)
    with hold(out):
        result.save(out)
        pictures = {path.stem: path for kind in ("codewords", "contributions") for path in sorted((_maps(embeddings) / kind).glob("*.png"))}
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
    from .evaluation import show
    from .report import evaluation_page

    rows, named = [], {"embedding": "embedding", "mean-pool": "mean pooling", "compared": "mean pooling, untrained"}
    for task, result in run_demo(out, slides=slides, seed=seed).items():
        evaluation_page(result, out / "eval" / task / "report.html", command=shlex.join(["dreslcl", *sys.argv[1:]]))
        scores = result.outcomes[0].scores
        for features, name in named.items():
            shots = max((kind for kind in scores[features] if kind.endswith("-shot")), key=lambda kind: int(kind.split("-")[0]))
            rows.append([task, name, *(show(scores[features][kind]["auroc"]) for kind in ("linear", "5-NN", shots))])
    print("These data are synthetic: drawn tissue, made-up reports. The figures say that the path works, nothing about medicine.")
    print("The tile encoder starts from weights that tell tumour from other tissue in drawn slides of other seeds, and know no diagnosis.")
    print_table(["task", "features of a slide", "AUROC, linear probe (95 %)", "AUROC, 5-NN", "AUROC, few shots"], rows)
    print(f"""look at: {out / "work/contact_sheet.jpg"} · {out / "run/curves.png"} · {out / "eval/subtype/report.html"}
next, with your own scans, reports.csv and labels.csv:
  dreslcl tile SCANS --out work
  dreslcl pretrain work --reports reports.csv --exclude split=test --out run
  dreslcl embed work --model run/model --patients labels.csv --out emb
  dreslcl eval emb --labels labels.csv --task subtype --split split --out eval""")


@command(panel="Help")
def encoders() -> None:
    """List the encoders that --encoder takes: feature width, input edge (px), parameters of the image tower, licence of the weights."""
    from .encoder import describe_encoder, list_encoders
    from .towers import FAMILIES

    rows = [*FAMILIES, *((name, *describe_encoder(name), "?", "of the weights chosen") for name in list_encoders())]
    print_table(["encoder", "width", "input px", "10⁶ parameters", "licence"], [list(map(str, row)) for row in rows])
    print("and any timm:NAME.TAG, hf-hub:ORG/NAME or local-dir:FOLDER", file=sys.stderr)


def main() -> None:
    """The entry point of the `dreslcl` command: a user's mistake, and what a user stops, ends in one line."""
    try:
        code = app(standalone_mode=False)
    except typer.Abort:
        code = 130
    except DreslclError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        code = 2 if isinstance(error, ConfigError) else 1
    except _UsageError as error:
        command = error.ctx.command_path if error.ctx else "dreslcl"
        message = error.format_message().rstrip(".").replace("Value error, ", "") or "no command given"
        print(f"{message}; see `{command} --help`", file=sys.stderr)
        code = 2
    if code == 130:
        name = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
        print(f"\n{_STOPPED.get(name, 'stopped; what is done is kept: run the same command again to go on')}", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)
