"""`hmlab train`: train a model and keep the run. `hmlab sample`: let a trained model write."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hmlab.commands.corpora import known_corpus
from hmlab.commands.output import Json, print_json, say
from hmlab.commands.runs import Folder, open_store
from hmlab.commands.settings import Refusal, Settings, pairs, parse_fields, user_values
from hmlab.registry import UnknownName

if TYPE_CHECKING:
    from hmlab.pretrained import Pretrained

TRAINING = "training."  # what fields of the training begin with among --set
OnMetrics = Callable[[Any], None]


def train(
    name: Annotated[str, typer.Argument(help="A preset or a memory; `hmlab list` names them.")],
    corpus: Annotated[str, typer.Option(help="A corpus of the catalogue, or a text file or folder.")] = "python",
    encoding: Annotated[Literal["character", "byte", "bpe"], typer.Option(help="What a token is.")] = "character",
    vocab_size: Annotated[int | None, typer.Option(help="Tokens of a bpe encoding.")] = None,
    dim: Annotated[int, typer.Option(help="Width of the model.")] = 64,
    layers: Annotated[int, typer.Option(help="Number of blocks.")] = 4,
    steps: Annotated[int, typer.Option(help="Steps of the optimizer.")] = 1000,
    batch: Annotated[int, typer.Option(help="Windows in a batch.")] = 16,
    context: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    schedule: Annotated[
        Literal["constant", "cosine", "step"], typer.Option(help="Course of the learning rate.")
    ] = "constant",
    warmup: Annotated[int, typer.Option(help="Steps of linear rise at the beginning.")] = 0,
    evaluate_every: Annotated[int, typer.Option(help="Steps between evaluations.")] = 500,
    evaluate_batches: Annotated[int, typer.Option(help="Batches of an evaluation.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="cuda where there is one")] = None,
    settings: Settings = [],  # noqa: B006
    runs: Folder = None,
    json: Json = False,
) -> None:
    """Train a model; the run is kept, and the same command resumes it.

    --set takes any field of the model or its memory and, after `training.`, any of the training
    (`--set training.clip=1`). With --json: one line a step, then one about the run.
    """
    from hmlab import registry
    from hmlab import run as experiments
    from hmlab import train as training
    from hmlab.tasks import language

    store = open_store(runs)
    chosen = pairs(settings, "--set")
    of_training = {k.removeprefix(TRAINING): v for k, v in chosen.items() if k.startswith(TRAINING)}
    of_model = {k: v for k, v in chosen.items() if not k.startswith(TRAINING)}
    with user_values():
        task = language.Config(
            corpus=known_corpus(corpus), encoding=encoding, vocab_size=vocab_size, batch=batch, context=context
        )
        vocab = task.open().vocab_size
        model = registry.model_config(name, dim=dim, vocab=vocab, layers=layers, settings=of_model)
        recipe = {
            "steps": steps, "learning_rate": lr, "schedule": schedule, "warmup": warmup,
            "evaluate_every": evaluate_every, "evaluate_batches": evaluate_batches,
        }  # fmt: skip
        recipe |= parse_fields(training.Config, of_training, prefix=TRAINING)
        experiment = experiments.Experiment(
            name=name, model=model, task=task, training=training.Config(**recipe), seed=seed
        )
    with user_values(), json_lines() if json else progress_bar(experiment.training.steps) as on_metrics:
        try:
            run = experiments.run(experiment, store, on_metrics=on_metrics, device=device)
        except KeyboardInterrupt:
            run = store.find(experiment.hash(), experiment.seed)  # which has made its checkpoint
            if run is None:
                raise
    info = run.info
    if json:
        print_json({key: info[key] for key in ("id", "state", "step", "steps", "hash", "seed")}, indent=None)
    else:
        print(run.id)
    if info["state"] != "finished":
        say(f"hmlab: stopped at step {info['step']} of {info['steps']}; the same command goes on from there")
        raise typer.Exit(130)


def sample(
    source: Annotated[
        str, typer.Argument(metavar="RUN|CHECKPOINT", help="A run, a model file, or a model from `hmlab list`.")
    ],
    prompt: Annotated[str, typer.Option(help="The text to go on from.")] = "\n",
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens to write.")] = 500,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Keep only the likeliest ones.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    runs: Folder = None,
) -> None:
    """Let a trained model write; the text appears as it is drawn."""
    import torch

    from hmlab import model as models

    model, encoding, _ = _trained(source, runs)
    ids = torch.from_numpy(encoding.encode(prompt)).long()[None]
    generator = torch.Generator().manual_seed(seed)
    with user_values():
        drawn = models.sample(model, ids, tokens, temperature=temperature, top_k=top_k, generator=generator)
        print(prompt, end="", flush=True)
        for piece in _pieces(encoding, (int(token) for token in drawn)):
            print(piece, end="", flush=True)
    print()


@contextmanager
def json_lines() -> Iterator[OnMetrics]:
    """Every step as a line of JSON."""

    def on_metrics(metrics: Any) -> None:
        print_json(asdict(metrics), indent=None)

    yield on_metrics


@contextmanager
def progress_bar(steps: int) -> Iterator[OnMetrics]:
    """A bar with the losses, the speed and the time to go, on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    numbers = "loss {task.fields[loss]:.3f}  valid {task.fields[valid]:.3f}  {task.fields[speed]:.0f} tokens/s"
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn(numbers), TimeRemainingColumn(elapsed_when_finished=True))
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=60) as bars:
        bar = bars.add_task("", total=steps, loss=math.nan, valid=math.nan, speed=math.nan)

        def on_metrics(metrics: Any) -> None:
            bars.update(bar, completed=metrics.step, loss=metrics.loss, speed=metrics.tokens_per_second)
            if not math.isnan(metrics.valid_loss):
                bars.update(bar, valid=metrics.valid_loss)

        yield on_metrics


def _trained(source: str, runs: Path | None) -> Pretrained:
    """A run's newest checkpoint, a model file, or a model that comes with hmlab."""
    from safetensors import SafetensorError

    from hmlab import pretrained

    store = open_store(runs)
    if source in store.ids():
        return store.open(source).pretrained()
    if source not in pretrained.names() and not Path(source).is_file():
        raise UnknownName("trained model", source, [*store.ids(), *pretrained.names()])
    try:
        with user_values():
            return pretrained.load(source)
    except SafetensorError as error:
        raise Refusal(f"{source}: expected a model in a safetensors file: {error}") from error


def _pieces(encoding: Any, tokens: Iterator[int]) -> Iterator[str]:
    """The text of the tokens, as soon as a character is complete: several tokens may share one."""
    held: list[int] = []
    for token in tokens:
        held.append(token)
        text = encoding.decode(held)
        # U+FFFD at the end is a character whose bytes have not all come; four bytes are the most there are.
        if not text.endswith("\ufffd") or len(held) > 3:
            yield text
            held = []
    if held:
        yield encoding.decode(held)
