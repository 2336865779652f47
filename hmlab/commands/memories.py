"""`hmlab new-memory`: begin a memory of your own. `hmlab check`: prove that it keeps the contract."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from hmlab.commands.output import Json, print_json
from hmlab.commands.settings import Refusal, Settings, pairs, parse_fields, user_values
from hmlab.registry import UnknownName


def new_memory(
    file: Annotated[Path, typer.Argument(help="The file to write, such as my_memory.py.")],
) -> None:
    """Copy the template of a memory, complete and working, to a new file."""
    import hmlab.templates

    if file.suffix != ".py" or not file.stem.isidentifier():
        raise Refusal(f"file: expected a name like my_memory.py, got {file.name!r}")
    if file.exists():
        raise Refusal(f"file: {file} is there already")
    if not file.parent.is_dir():
        raise Refusal(f"file: there is no folder {file.parent}")
    shutil.copyfile(Path(hmlab.templates.__file__).with_name("my_memory.py"), file)
    print(f"{file} is a complete memory. Replace its equation, then prove it:\n\n    hmlab check {file}:Config")


def check(
    memory: Annotated[
        str, typer.Argument(metavar="FILE[:CONFIG]|NAME", help="A file and its Config, or a memory's name.")
    ],
    dim: Annotated[int, typer.Option(help="Width.")] = 16,
    settings: Settings = [],  # noqa: B006
    only: Annotated[list[str], typer.Option(metavar="POINT", help="Only this point of the contract; repeatable.")] = [],  # noqa: B006
    compile: Annotated[bool, typer.Option(help="Also through torch.compile.")] = True,
    allow_rnn: Annotated[bool, typer.Option(help="Let torch.compile take nn.GRU and its kind.")] = False,
    exact_gradients: Annotated[
        bool, typer.Option(help="Gradients must be those of the values; not so where a memory stops them on purpose.")
    ] = True,
    json: Json = False,
) -> None:
    """Prove that a memory keeps every point of the contract."""
    from dataclasses import asdict

    from hmlab.testing import POINTS, ContractViolation, check_memory

    for point in only:
        if point not in POINTS:
            raise UnknownName("point of the contract", point, POINTS)
    config_class = _config_class(memory)
    with user_values():
        config = config_class(dim=dim, **parse_fields(config_class, pairs(settings, "--set")))
    try:
        report = check_memory(
            config.build, only=only or None, compile=compile, allow_rnn=allow_rnn, exact_gradients=exact_gradients
        )
    except ContractViolation as violation:
        raise Refusal(str(violation), status=1) from violation
    if json:
        print_json({"memory": report.memory, "points": [asdict(line) for line in report.lines]})
    else:
        print(report)


def _config_class(memory: str) -> type:
    """The Config of `FILE:CLASS`, of `FILE` (its `Config`), or of a memory's name."""
    from hmlab import registry

    path, _, name = memory.partition(":")
    if not path.endswith(".py"):
        return registry.memory_config(memory)
    if not Path(path).is_file():
        raise Refusal(f"memory: there is no file {path}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    found = getattr(module, name or "Config", None)
    if not isinstance(found, type):
        classes = [key for key, value in vars(module).items() if isinstance(value, type)]
        raise UnknownName(f"class in {path}", name or "Config", classes)
    return found
