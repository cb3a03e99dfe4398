"""Settings: one YAML file, `ROOKWORLD_<KEY>` of the environment and `--key value`, into dataclasses. The later wins.

The parser is transformers' `HfArgumentParser`, as in TRL's programs; strict, so that a typo never trains: an error
names the file and line (or the variable, or the command line), the key and what to write instead. A file may start
from others: `extends: ../../presets/standard.yaml` (or a list, later ones winning), relative to itself.
"""

import argparse
import copy
import dataclasses
import difflib
import json
import math
import operator
import os
import re
import shlex
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import yaml
from transformers.hf_argparser import HfArgumentParser

EXIT_BAD_INPUT = 2
ENVIRONMENT = "ROOKWORLD_"
EXTENDS = "extends"
# What other trainers call a key: for the hint of an error, where the nearest spelling would mislead.
_SYNONYMS = (
    "lr=learning_rate steps/num_steps=max_steps epochs=num_train_epochs batch_size=per_device_train_batch_size "
    "grad_accum=gradient_accumulation_steps group_size/num_samples=num_generations "
    "max_new_tokens=max_completion_length clip/clip_range/clip_eps=epsilon kl_coef=beta target_kl=kl_target "
    "adaptive_kl=kl_control baseline_type=advantage_baseline grad_clip=max_grad_norm dtype=bf16"
)
SYNONYMS = {word: key for words, key in (pair.split("=") for pair in _SYNONYMS.split()) for word in words.split("/")}
BOUNDS = {"least": (operator.ge, "of at least"), "above": (operator.gt, "above"), "most": (operator.le, "of at most")}
KINDS = {"int": "a whole number", "float": "a number", "string_to_bool": "true or false", "dict": "a mapping"}

# An option that takes a token, and what follows it; a token of the Hub, wherever it stands.
_SECRET = re.compile(r"(?<=--)([\w-]*token)([= ])\S+|\bhf_\w{8,}")
_SECRET_NAME = re.compile(r"(?:--|ROOKWORLD_)(?:[\w-]*token|alert)", re.IGNORECASE)


class RecipeError(ValueError):
    """A recipe, or something it points at, that cannot be used as it is."""


def option(default: Any, help: str, **more: Any) -> Any:
    """A dataclass field with the sentence that `--help` and the tables of `docs/` show beside it."""
    metadata = {"help": help.replace("%", "%%"), **more}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def require(condition: bool, name: str, value: Any, problem: str, remedy: str) -> None:
    """The one shape of errors about settings: field, value, what is wrong with it, what to do.

    Raises:
        ValueError: the condition does not hold.
    """
    if not condition:
        raise ValueError(f"`{name}` is {value!r}: {problem}. {remedy[0].upper()}{remedy[1:]}.")


def check_options(config: Any) -> None:
    """Hold the values of a dataclass to what its options say: the choices of a `Literal`, and numbers to `least`,
    `above` and `most` (`option(0.2, "...", least=0, most=1)`); None is left to the class.

    Raises:
        ValueError: see `require`.
    """
    hints = typing.get_type_hints(type(config))
    for each in dataclasses.fields(config):
        value, hint = getattr(config, each.name, None), hints[each.name]
        if value is None:
            continue
        for member in typing.get_args(hint) if _is_union(hint) else (hint,):
            if typing.get_origin(member) is typing.Literal:
                choices = typing.get_args(member)
                require(value in choices, each.name, value, "no such choice", f"choose one of {', '.join(choices)}")
        for name, (holds, words) in BOUNDS.items():
            if (bound := each.metadata.get(name)) is not None:
                fits = isinstance(value, int | float) and math.isfinite(value) and holds(value, bound)
                require(fits, each.name, value, f"it must be a finite number {words} {bound:g}", "set it so")


def parse(
    classes: Sequence[type],
    argv: Sequence[str] | None = None,
    about: str | None = None,
    check: Callable[..., None] | None = None,
) -> tuple[Any, ...]:
    """Read `--config FILE` and `--key value` pairs into one instance of each dataclass.

    A bare `--flag` means true, `null` none. Lists are written `--key a b` or as in YAML, mappings as in YAML.

    Args:
        classes: dataclasses; a key may be a field of only one of them.
        argv: arguments without the program name; `sys.argv[1:]` by default.
        about: what `--help` says first.
        check: called with the instances; raises a ValueError where some do not go together.

    Returns:
        The instances, in the order of `classes`.

    Raises:
        RecipeError: an unreadable file, an unknown or repeated key, a value of the wrong type, or values that a
            dataclass refuses together.
    """
    parser = _Parser(classes, check, description=about, formatter_class=_Help)
    config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config.add_argument("--config", action="append", default=[])
    given, words = config.parse_known_args(sys.argv[1:] if argv is None else argv)
    if len(given.config) > 1:
        raise RecipeError(f"command line: --config stands twice; write a file that begins with '{EXTENDS}: [A, B]'")
    file = given.config[0] if given.config else None
    settings = (_read(Path(file)) if file else {}) | parser.variables()
    typed = {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    return parser.build({key: value for key, value in settings.items() if key not in typed}, words, file)


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


class _Parser(HfArgumentParser):
    """Transformers' parser, which every value passes as text, wherever it was written."""

    def __init__(self, classes: Sequence[type], check: Callable[..., None] | None = None, **options: Any):
        self.check = check
        self.keys: dict[str, argparse.Action] = {}
        self.sources: dict[str, str] = {}
        super().__init__(classes, allow_abbrev=False, **options)
        self.keys = {field.name: self._option_string_actions[f"--{field.name}"] for field in self._fields()}

    def _fields(self) -> Iterator[dataclasses.Field[Any]]:
        return (field for cls in self.dataclass_types for field in dataclasses.fields(cls) if field.init)

    @staticmethod
    def _parse_dataclass_field(parser: argparse.ArgumentParser, field: dataclasses.Field[Any]) -> None:
        """Every field may be null where its type says so, a bare flag means true, and collections are YAML."""
        hints = set(_members(field.type))
        field = copy.copy(field)
        field.metadata = MappingProxyType({name: each for name, each in field.metadata.items() if name not in BOUNDS})
        if {list, str} <= hints:
            field.type = str | None  # text, or a list as in YAML: of such a union transformers' parser takes any member
        HfArgumentParser._parse_dataclass_field(parser, field)
        action = parser._option_string_actions[f"--{field.name}"]
        action.type = _reader(action.type, hints)
        if action.nargs == "+":
            action.nargs = "*"
        if action.choices and type(None) in hints:
            action.choices = [*action.choices, None]
        if bool in hints and action.nargs is None:
            action.nargs, action.const = "?", True

    def variables(self) -> dict[str, tuple[Any, str]]:
        """The variables `ROOKWORLD_<KEY>`, as value and source.

        Raises:
            RecipeError: one that is called after no key: it would be a setting that does nothing.
        """
        found: dict[str, tuple[Any, str]] = {}
        for name in sorted(name for name in os.environ if name.startswith(ENVIRONMENT)):
            key, text = name.removeprefix(ENVIRONMENT).lower(), os.environ[name]
            if key not in self.keys:
                hint = _hint(key, self.keys, lambda key: f"{ENVIRONMENT}{key.upper()}")
                raise RecipeError(f"environment: {name} is called after no key; {hint}. Or unset it")
            found[key] = (yaml.safe_load(text) if text[:1] in ("[", "{") else text, f"environment {name}")
        return found

    def build(self, settings: dict[str, tuple[Any, str]], words: list[str], file: str | None) -> tuple[Any, ...]:
        """The dataclasses, from settings with their sources and from the words of the command line."""
        self.sources = {key: source for key, (_, source) in settings.items()}
        for key, source in self.sources.items():
            if key not in self.keys:
                raise RecipeError(f"{source}: unknown key '{key}'; {_hint(key, self.keys)}")
        given = [word for key, (value, _) in settings.items() for word in self._words(key, value)]
        for word in self.parse_known_args([*given, *words])[1]:
            if not word.startswith("--"):
                raise RecipeError(f"command line: '{word}' stands alone; write --key value")
            key = word[2:].partition("=")[0].replace("-", "_")
            raise RecipeError(f"command line: unknown key '{key}'; {_hint(key, self.keys)}")
        typed = {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}
        where = self.sources | dict.fromkeys(typed, "command line")
        try:
            made = super().parse_args_into_dataclasses([*given, *words], look_for_args_file=False)
            values = vars(self.parse_known_args([*given, *words])[0])
            for each in (each for each in made if hasattr(each, "given")):
                each.given = {key: values[key] for key in self.keys if key in where}
            if self.check is not None:
                self.check(*made)
            return made
        except RecipeError:
            raise
        except (ValueError, TypeError) as error:
            # The class knows its fields but not where they were set: say so for each one that its message names.
            named = set(re.findall(r"\w+", str(error)))
            places = [f"{key} ({where.get(key, 'not set')})" for key in self.keys if key in named]
            remedy = f" Change {' or '.join(places)}." if places else ""
            raise RecipeError(f"{file or 'command line'}: {error}{remedy}") from error

    def _words(self, key: str, value: Any) -> list[str]:
        """A setting as it would be typed."""
        if self.keys[key].nargs == "*" and isinstance(value, list):
            return [f"--{key}", *map(_text, value)]
        return [f"--{key}={_text(value)}"]

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        found, rest = super().parse_known_args(args, namespace)
        for key, value in vars(found).items():
            if isinstance(value, list) and len(value) == 1 and (value[0] is None or isinstance(value[0], list)):
                setattr(found, key, value[0])  # null, or a list as in YAML
        return found, rest

    def error(self, message: str) -> NoReturn:
        """Raises:
        RecipeError: with what argparse says, behind the place where the key was set.
        """
        found = re.fullmatch(r"argument --(\w+)\S*: (.*)", message, re.DOTALL)
        if not found:
            raise RecipeError(f"command line: {message}")
        key, text = found.groups()
        text = re.sub(r"invalid (\w+) value: (.*)", lambda m: f"is {m[2]}; write {KINDS.get(m[1], m[1])}", text)
        raise RecipeError(f"{self.sources.get(key, 'command line')}: key '{key}' {text}")


def _members(hint: Any) -> Iterator[Any]:
    """The types that a field of a type may hold, without what stands in their brackets."""
    for each in typing.get_args(hint) if type(None) in typing.get_args(hint) or _is_union(hint) else (hint,):
        yield typing.get_origin(each) or each


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, type(int | str))


def _reader(kind: Any, hints: set[Any]) -> Callable[[str], Any]:
    """Reads a value's text: `null` and collections where the field's type has them, the rest as `kind`."""

    def read(text: str) -> Any:
        if text == "null" and type(None) in hints:
            return None
        if text[:1] in ("[", "{") and hints & {list, dict}:
            value = yaml.safe_load(text)
            if type(value) in hints or list in hints:
                return (
                    [kind(each) for each in value] if kind in (int, float, str) and isinstance(value, list) else value
                )
        if kind is dict:
            raise ValueError
        return text if kind is None else kind(text)

    read.__name__ = getattr(kind, "__name__", str(kind))
    return read


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _hint(word: str, known: Iterable[str], shown: Callable[[str], str] = "'{}'".format) -> str:
    """The key that a word means, or whose spelling is nearest."""
    known = list(known)
    if SYNONYMS.get(word) in known:
        return f"what other trainers call so is {shown(SYNONYMS[word])}"
    return f"the nearest valid key is {shown(difflib.get_close_matches(word, known, n=1, cutoff=0.0)[0])}"


def _read(path: Path, whence: str = "", above: tuple[Path, ...] = ()) -> dict[str, tuple[Any, str]]:
    """A file's settings, each with its source, laid over those of the files it extends; plain values as written.

    Args:
        whence: the place that names this file; empty for the command line.
        above: the files that led here, resolved.
    """
    if path.resolve() in above:
        raise RecipeError(f"{whence}: '{EXTENDS}' leads back to {path}; remove one of the links")
    try:
        text = path.read_text(encoding="utf-8")
        node, document = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is no text, so this is no recipe ({error}); give a YAML file") from error
    except OSError as error:
        remedy = f"correct '{EXTENDS}' in {whence}" if whence else "give --config an existing YAML file"
        raise RecipeError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{path}: holds no settings; write one 'key: value' a line")
    own: dict[str, tuple[Any, str]] = {}
    for key_node, value_node in node.value:
        key, source = str(key_node.value), f"{path} line {key_node.start_mark.line + 1}"
        if key in own:
            raise RecipeError(f"{source}: key '{key}' stands twice; remove one ({own[key][1]})")
        value = document.get(key)
        # YAML reads `no` as false and 1e-5 as text: what is written is what the parser is given, as on a command line.
        own[key] = (
            value_node.value if isinstance(value_node, yaml.ScalarNode) and value is not None else value,
            source,
        )
    bases, source = own.pop(EXTENDS, ([], ""))
    settings: dict[str, tuple[Any, str]] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        settings |= _read(path.parent / str(base), source, (*above, path.resolve()))
    return settings | own


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
    """Turn an error about what the user gave into one line on stderr and exit code 2, or its own, without a traceback.

    Wrap only the setting-up with it, never the training: there a `ValueError` is a bug and wants its traceback.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"error: {without_secrets(str(error))}", file=sys.stderr)
        raise SystemExit(getattr(error, "exit_code", EXIT_BAD_INPUT)) from error


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
