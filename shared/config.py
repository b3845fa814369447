"""YAML files into frozen, strict settings; every mistake is told as ``file:line:column: key: what is wrong``."""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo

from medfl.shared.addresses import without_brackets
from medfl.shared.errors import ConfigError


class Settings(BaseModel):
    """Base of every settings section: unknown keys refused, frozen, finite numbers, values never echoed in errors.

    Declare paths as :data:`LocalPath`, so that they are taken from the folder of the file that names them.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, hide_input_in_errors=True, protected_namespaces=(), allow_inf_nan=False
    )


def _from_the_files_folder(path: Path, info: ValidationInfo) -> Path:
    folder = (info.context or {}).get("folder")
    try:
        path = Path(os.path.expandvars(path)).expanduser()
    except RuntimeError:
        raise ValueError("no such user has a home folder here: write the path itself") from None
    if missing := re.match(r".*\$\{?([A-Za-z_][A-Za-z0-9_]*)", str(path)):
        raise ValueError(f"environment variable {missing[1]} is not set: export it, or write the path itself")
    return path if folder is None or path.is_absolute() else Path(os.path.normpath(folder / path))


LocalPath = Annotated[Path, AfterValidator(_from_the_files_folder)]
"""A path that, when relative, counts from the folder of the configuration file; ``$NAME`` and ``~`` are expanded."""


Host = Annotated[str, AfterValidator(without_brackets)]
"""A name or an address to listen on; an IPv6 address with or without brackets."""


class LocalPort(Settings):
    """Where a service for this machine listens: on loopback unless told otherwise, without authentication."""

    host: Host = "127.0.0.1"
    port: int = Field(ge=0, le=65535)


def later(default: Any, **limits: Any) -> Any:
    """A field that a study gained after studies were first signed; at its default it is left out of what is hashed.

    So a study that does not use it keeps the digest under which sites approved it, and sites of the release before,
    which do not know the field, still understand it. ``default`` must mean what those releases do, and never changes.
    """
    return Field(default=default, exclude_if=lambda value: value == default, **limits)


S = TypeVar("S", bound=BaseModel)
Location = tuple[str | int, ...]
_DEEPEST = 64


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 booleans (``no`` stays text: it is Norway) and floats such as ``1e-5``."""


_StrictLoader.yaml_implicit_resolvers = {
    first: [pair for pair in resolvers if pair[0] not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false|True|False)$"), list("tTfF"))
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.inf|\.nan)$"),
    list("-+0123456789."),
)


def load_settings(path: Path, model: type[S], *, overrides: Mapping[str, Any] | None = None) -> S:
    """Read ``path`` as YAML and validate it as ``model``.

    Relative :data:`LocalPath` values are taken from the file's own folder. A value ``${NAME}`` is replaced by
    that environment variable; ``file:PATH`` by the content of a file that only its owner can read.
    ``overrides`` replaces top-level keys (already parsed values).

    Raises:
        ConfigError: one line per problem, ``file:line:column: key: message``; secrets are never echoed.
    """
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}): give the path of a YAML file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text") from None
    return parse_settings(text, model, name=str(path), folder=path.parent, overrides=overrides)


def parse_settings(
    text: str, model: type[S], *, name: str, folder: Path | None = None, overrides: Mapping[str, Any] | None = None
) -> S:
    """Validate YAML ``text`` as ``model``; ``name`` stands before each error (see :func:`load_settings`)."""
    try:
        node = yaml.compose(text, _StrictLoader)
        if node is None:
            raise ConfigError(f"{name}: is empty")
        marks = _marks(node, name)
        raw = yaml.load(text, _StrictLoader)  # noqa: S506 - a SafeLoader subclass
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{mark.line + 1}:{mark.column + 1}: " if mark else ""
        raise ConfigError(f"{name}:{where}{error.problem}") from None
    except ConfigError:
        raise
    except Exception as error:  # PyYAML's constructors of tags such as !!int raise whatever their parsing meets
        raise ConfigError(f"{name}: is not valid YAML ({type(error).__name__})") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{name}:1:1: must be a mapping of keys to values")
    raw.update(overrides or {})
    expanded = _expand(raw, (), lambda where, what: ConfigError(_placed(name, marks, where, what)), folder)
    try:
        return model.model_validate(expanded, context={"folder": folder})
    except ValidationError as error:
        lines = [_line(name, marks, raw, model, e) for e in error.errors(include_url=False, include_input=False)]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def _marks(node: yaml.Node, name: str) -> dict[Location, yaml.Mark]:
    """Position of every key (or, for list items, of the value) by its location; duplicate keys are refused."""
    marks: dict[Location, yaml.Mark] = {}
    pending: list[tuple[Location, yaml.Node]] = [((), node)]
    visited: set[int] = set()
    while pending:
        where, current = pending.pop()
        marks.setdefault(where, current.start_mark)
        if id(current) in visited:  # an alias: its content has been placed
            continue
        visited.add(id(current))
        if isinstance(current, yaml.MappingNode):
            seen: dict[str, int] = {}
            for key, value in current.value:
                text, line, column = str(key.value), key.start_mark.line + 1, key.start_mark.column + 1
                if text in seen:
                    raise ConfigError(f"{name}:{line}:{column}: {text}: is given twice (first at line {seen[text]})")
                seen[text] = line
                marks[(*where, text)] = key.start_mark
                pending.append(((*where, text), value))
        elif isinstance(current, yaml.SequenceNode):
            pending.extend(((*where, index), item) for index, item in enumerate(current.value))
    return marks


def _expand(value: Any, where: Location, mistake: Callable[[Location, str], ConfigError], folder: Path | None) -> Any:
    if len(where) > _DEEPEST:  # an alias inside its own anchor never ends
        raise mistake(where[:1], "is nested too deeply")
    if isinstance(value, dict):
        return {key: _expand(item, (*where, str(key)), mistake, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, (*where, index), mistake, folder) for index, item in enumerate(value)]
    try:
        if isinstance(value, str) and (match := re.fullmatch(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}", value)):
            if match[1] not in os.environ:
                raise ValueError(f"environment variable {match[1]} is not set: export it")
            return os.environ[match[1]]
        if isinstance(value, str) and value.startswith("file:"):
            return _read_secret(value[5:], folder)
    except ValueError as error:
        raise mistake(where, str(error)) from None
    return value


def _read_secret(reference: str, folder: Path | None) -> str:
    """Content of a secret file, taken from ``$CREDENTIALS_DIRECTORY`` (systemd) when it is there."""
    credentials = os.environ.get("CREDENTIALS_DIRECTORY")
    path = Path(reference)
    if "\0" in reference:
        raise ValueError("the name of a secret file cannot be read: it holds a null character")
    if credentials and (Path(credentials) / path.name).is_file():
        path = Path(credentials) / path.name
    elif folder is not None and not path.is_absolute():
        path = folder / path
    try:
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ValueError(f"secret file {path} can be read by others: run chmod 600 on it")
        return path.read_text("utf-8").strip()
    except OSError as error:
        raise ValueError(f"secret file {path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ValueError(f"secret file {path} cannot be read (not UTF-8 text)") from None


def _line(name: str, marks: dict[Location, yaml.Mark], raw: Any, model: type[BaseModel], error: Any) -> str:
    where = _in_file(error["loc"], raw)
    message = _wording(error)
    if error["type"] == "extra_forbidden" and where:
        known = difflib.get_close_matches(str(where[-1]), _keys_at(model, where[:-1]), 1)
        message += f" (did you mean '{known[0]}'?)" if known else ""
    return _placed(name, marks, where, message)


def _placed(name: str, marks: dict[Location, yaml.Mark], where: Location, message: str) -> str:
    """One line of an error: the place of the key, or of the nearest section around it that is in the file."""
    mark = next((marks[where[:n]] for n in range(len(where), -1, -1) if where[:n] in marks), None)
    position = f"{mark.line + 1}:{mark.column + 1}: " if mark else ""
    key = ".".join(map(str, where))
    return f"{name}:{position}{key + ': ' if key else ''}{message}"


def _wording(error: Any) -> str:
    match error["type"]:
        case "extra_forbidden":
            return "unknown key"
        case "missing":
            return "is required"
        case "value_error":
            return str(error["msg"]).removeprefix("Value error, ")
        case _:
            message = str(error["msg"])
            return message[:1].lower() + message[1:]


def _in_file(location: Location, raw: Any) -> Location:
    """Drop from pydantic's location what is not in the file (tags of discriminated unions, type names)."""
    out: list[str | int] = []
    for index, part in enumerate(location):
        last = index == len(location) - 1
        in_mapping = isinstance(raw, dict) and part in raw
        if in_mapping or (isinstance(raw, list) and isinstance(part, int) and part < len(raw)):
            out.append(part)
            raw = raw[part]
        elif last and isinstance(raw, dict) and isinstance(part, str) and re.fullmatch(r"[a-z_0-9]+", part):
            out.append(part)
    return tuple(out)


def _keys_at(model: Any, where: Location) -> list[str]:
    """Names allowed at ``where``: the fields of every model that can stand there."""
    models = [model]
    for part in where:
        models = [
            inner
            for candidate in models
            for inner in (
                _models_in(candidate.model_fields[part].annotation)
                if isinstance(part, str) and part in candidate.model_fields
                else [candidate]
                if isinstance(part, int)
                else []
            )
        ]
    return [field for candidate in models for field in candidate.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [inner for argument in get_args(annotation) for inner in _models_in(argument)]
