"""Recipes: one YAML file, `--key value` to override it, typed dataclasses out. Strict, so that a typo never trains.

Every key must be a field of one of the dataclasses and every value must have the field's type. An error names the
file and line (or the command line), the key and what to write instead. Variables `ROOKWORLD_<KEY>` of the environment
stand between the two: `ROOKWORLD_MAX_STEPS=5` wins over the file, and `--max_steps 6` over both.

A file may start from others: `extends: ../../presets/standard.yaml` (or a list, later ones winning), relative to
itself; its own keys win over theirs.
"""

import dataclasses
import difflib
import os
import re
import shlex
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from rookworld_trl.help import ENVIRONMENT, alternatives, usage

EXIT_BAD_INPUT = 2
EXTENDS = "extends"
# What other trainers call a key: for the hint of an error, where the nearest spelling would mislead.
SYNONYMS = {
    "lr": "learning_rate",
    "steps": "max_steps",
    "num_steps": "max_steps",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "group_size": "num_generations",
    "num_samples": "num_generations",
    "max_new_tokens": "max_completion_length",
    "clip": "epsilon",
    "clip_range": "epsilon",
    "clip_eps": "epsilon",
    "kl_coef": "beta",
    "target_kl": "kl_target",
    "adaptive_kl": "kl_control",
    "baseline_type": "advantage_baseline",
    "grad_clip": "max_grad_norm",
    "dtype": "bf16",
}

# An option that takes a token, and what follows it; a token of the Hub, wherever it stands.
_SECRET = re.compile(r"(?<=--)([\w-]*token)([= ])\S+|\bhf_\w{8,}")
_SECRET_NAME = re.compile(r"(?:--|ROOKWORLD_)(?:[\w-]*token|alert)", re.IGNORECASE)


class RecipeError(ValueError):
    """A recipe, or something it points at, that cannot be used as it is."""


@dataclass(frozen=True, slots=True)
class _Setting:
    value: Any
    source: str  # "file.yaml line 3", "environment" or "command line"
    text: str | None = None  # as written, of a plain value: YAML reads `no` as false, a choice may be called that
    typed: bool = False  # on the command line, where nobody quotes: a field of type str takes `text` for what it is


def parse_recipe(types_: Sequence[type], argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Read `--config FILE` and `--key value` pairs into one instance of each dataclass.

    The command line wins over the environment, and that over the file, whatever their order. A bare `--flag` means
    true. Lists and mappings are written as in YAML: `--report_to '[tensorboard]'`.

    Args:
        types_: dataclasses; a key may be a field of only one of them.
        argv: arguments without the program name; `sys.argv[1:]` by default.

    Returns:
        The instances, in the order of `types_`.

    Raises:
        RecipeError: an unreadable file, an unknown or repeated key, a value of the wrong type, or values that a
            dataclass refuses together.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    hints = {cls: _init_hints(cls) for cls in types_}
    known = {key: hint for cls in types_ for key, hint in hints[cls].items()}
    if {"-h", "--help"} & set(argv):
        print(usage(types_, hints))
        raise SystemExit(0)

    settings: dict[str, _Setting] = {}
    overrides = _read_environment(os.environ, known) | _read_command_line(argv)
    config = overrides.pop("config", None)
    if config is not None:
        settings |= _read_recipe(Path(config.text or ""))
    if EXTENDS in overrides:
        raise RecipeError(f"command line: '{EXTENDS}' belongs in a file; write one that begins with it, for --config")
    settings |= overrides

    values: dict[str, Any] = {}
    for key, setting in settings.items():
        if key not in known:
            raise RecipeError(f"{setting.source}: unknown key '{key}'; {_hint(key, known)}")
        values[key] = _typed(key, setting, known[key])
    source = str(config.text) if config else "command line"
    return tuple(_build(cls, {k: v for k, v in values.items() if k in hints[cls]}, settings, source) for cls in types_)


def option(default: Any, help: str) -> Any:
    """A dataclass field with the sentence that `--help` and `docs/recipes.md` show beside it."""
    return dataclasses.field(default=default, metadata={"help": help})


def without_secrets(text: str) -> str:
    """The text with the values of tokens replaced by `***`: what is printed ends in logs, and cards are published."""
    return _SECRET.sub(lambda found: f"{found[1] or ''}{found[2] or ''}***", text)


def command() -> str:
    """The program's command line behind the settings from the environment, without secrets: what quotes it is
    published, and an address to alert may be one."""
    words, secret = [], False
    variables = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(ENVIRONMENT)]
    for word in (*variables, *sys.argv):
        name, equals, _ = word.partition("=")
        hidden, secret = secret, bool(_SECRET_NAME.fullmatch(name)) and not equals
        named = f"{name}=***" if equals and _SECRET_NAME.fullmatch(name) else word
        words.append("***" if hidden else named)
    return without_secrets(" ".join(word if word.endswith("***") else shlex.quote(word) for word in words))


@contextmanager
def bad_input() -> Iterator[None]:
    """Turn an error about what the user gave into one line on stderr and exit code 2, without a traceback.

    Wrap only the setting-up with it, never the training: there a `ValueError` is a bug and wants its traceback.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"error: {without_secrets(str(error))}", file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT) from error


@contextmanager
def blame(key: str, value: Any) -> Iterator[None]:
    """Say which setting an error about a file or a repository came from.

    Raises:
        RecipeError: the block raised a `ValueError` or `OSError`.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        raise RecipeError(f"`{key}` is {str(value)!r}: {error}. Change `{key}`") from error


def _init_hints(cls: type) -> dict[str, Any]:
    resolved = typing.get_type_hints(cls)
    return {field.name: resolved[field.name] for field in fields(cls) if field.init}


def _read_recipe(path: Path, whence: str = "", above: tuple[Path, ...] = ()) -> dict[str, _Setting]:
    """A file's settings laid over those of the files it extends.

    Args:
        whence: the place that names this file; empty for the command line.
        above: the files that led here, resolved.
    """
    if path.resolve() in above:
        raise RecipeError(f"{whence}: '{EXTENDS}' leads back to {path}; remove one of the links")
    own = _read_file(path, whence)
    extends = own.pop(EXTENDS, None)
    if extends is None:
        return own
    bases = extends.value if isinstance(extends.value, list) else [extends.value]
    if not all(isinstance(base, str) for base in bases):
        raise RecipeError(f"{extends.source}: key '{EXTENDS}' is {extends.value!r}; write a path or a list of paths")
    settings: dict[str, _Setting] = {}
    for base in bases:
        settings |= _read_recipe(path.parent / base, extends.source, (*above, path.resolve()))
    return settings | own


def _read_file(path: Path, whence: str = "") -> dict[str, _Setting]:
    """The top-level mapping of a YAML file, with the line of each key; `whence` as in `_read_recipe`."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is no text, so this is no recipe ({error}); give a YAML file") from error
    except OSError as error:
        remedy = f"correct '{EXTENDS}' in {whence}" if whence else "give --config an existing YAML file"
        raise RecipeError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    try:
        node, document = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{path}: holds no settings; write one 'key: value' a line")
    settings: dict[str, _Setting] = {}
    for key_node, value_node in node.value:
        key, source = str(key_node.value), f"{path} line {key_node.start_mark.line + 1}"
        if key in settings:
            raise RecipeError(f"{source}: key '{key}' stands twice; remove one ({settings[key].source})")
        if key not in document:
            raise RecipeError(f"{source}: key '{key}' is not plain text; write names as keys")
        settings[key] = _Setting(
            document[key], source, value_node.value if isinstance(value_node, yaml.ScalarNode) else None
        )
    return settings


def _read_environment(environment: Mapping[str, str], known: Iterable[str]) -> dict[str, _Setting]:
    """The variables `ROOKWORLD_<KEY>`, `ROOKWORLD_CONFIG` among them.

    Raises:
        RecipeError: one that is called after no key: it would be a setting that does nothing.
    """
    keys = {f"{ENVIRONMENT}{key.upper()}": key for key in (*known, "config")}
    settings: dict[str, _Setting] = {}
    for name in sorted(name for name in environment if name.startswith(ENVIRONMENT)):
        if name not in keys:
            hint = _hint(
                name.removeprefix(ENVIRONMENT).lower(), keys.values(), lambda key: f"{ENVIRONMENT}{key.upper()}"
            )
            raise RecipeError(f"environment: {name} is called after no key; {hint}. Or unset it")
        settings[keys[name]] = _Setting(_read_text(environment[name]), f"environment {name}", environment[name], True)
    return settings


def _hint(word: str, known: Iterable[str], shown: Callable[[str], str] = "'{}'".format) -> str:
    """The key that a word means, or whose spelling is nearest."""
    known = list(known)
    if SYNONYMS.get(word) in known:
        return f"what other trainers call so is {shown(SYNONYMS[word])}"
    return f"the nearest valid key is {shown(difflib.get_close_matches(word, known, n=1, cutoff=0.0)[0])}"


def _read_text(text: str) -> Any:
    """A value as YAML reads it; text that is no YAML is text."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _read_command_line(argv: list[str]) -> dict[str, _Setting]:
    settings: dict[str, _Setting] = {}
    rest = argv[::-1]
    while rest:
        word = rest.pop()
        if not word.startswith("--"):
            raise RecipeError(f"command line: '{word}' stands alone; write --key value")
        key, equals, text = word[2:].partition("=")
        if not equals:
            text = rest.pop() if rest and not rest[-1].startswith("--") else "true"
        if key == "config" in settings:
            raise RecipeError(f"command line: --config stands twice; write a file that begins with '{EXTENDS}: [A, B]'")
        settings[key.replace("-", "_")] = _Setting(_read_text(text), "command line", text, typed=True)
    return settings


def _typed(key: str, setting: _Setting, hint: Any) -> Any:
    try:
        return _coerce(setting, hint)
    except TypeError:
        shown = setting.text if setting.typed else setting.value
        raise RecipeError(f"{setting.source}: key '{key}' is {shown!r}; write {_describe(hint)}") from None


def _coerce(setting: _Setting, hint: Any) -> Any:
    """The value as the type `hint` asks for; nothing is guessed beyond int -> float and YAML's unread '1e-5'.

    Raises:
        TypeError: it is none.
    """
    # Text on the command line fits str whatever it says: ask the stricter types first.
    for kind in sorted(alternatives(hint), key=lambda kind: kind is str):
        with suppress(TypeError, ValueError):
            return _coerce_to(kind, setting.value, setting)
    raise TypeError


def _coerce_to(kind: Any, value: Any, setting: _Setting) -> Any:
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if isinstance(kind, tuple):
        for choice in kind:
            if setting.text == choice or (value == choice and type(value) is type(choice)):  # True == 1
                return choice
    if kind is Any or (origin in (bool, int, types.NoneType) and type(value) is origin):
        return value
    if kind is float and not isinstance(value, bool):
        return float(value)  # YAML 1.1 reads 1e-5, without a dot, as text
    if kind is str and (setting.typed or isinstance(value, str)):
        return setting.text if setting.typed else value
    if origin is list and isinstance(value, list):
        return [_coerce(_Setting(item, ""), arguments[0]) for item in value] if arguments else value
    if origin is dict and isinstance(value, dict):
        return {k: _coerce(_Setting(v, ""), arguments[1]) for k, v in value.items()} if arguments else value
    raise TypeError


def _describe(hint: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "null"}
    words = []
    for kind in alternatives(hint):
        origin = typing.get_origin(kind) or kind
        if isinstance(kind, tuple):
            words.append("one of " + ", ".join(map(repr, kind)))
        elif origin is list:
            words.append(f"a list, each item {_describe(typing.get_args(kind)[0])}")
        else:
            words.append("a mapping" if origin is dict else names.get(kind, getattr(kind, "__name__", str(kind))))
    return " or ".join(words)


def _build(cls: type, values: dict[str, Any], settings: dict[str, _Setting], source: str) -> Any:
    for field in fields(cls):
        required = field.init and field.default is MISSING and field.default_factory is MISSING
        if required and field.name not in values:
            raise RecipeError(f"{source}: key '{field.name}' is missing; add it")
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        # The class knows its fields but not where they were set: say so for each one that its message names.
        words = set(str(error).replace("`", " ").replace("'", " ").replace("=", " ").split())
        named = [field.name for field in fields(cls) if field.name in words]
        places = [f"{name} ({settings[name].source if name in settings else 'not set'})" for name in named]
        raise RecipeError(f"{source}: {error}" + (f" Change {' or '.join(places)}." if places else "")) from error
