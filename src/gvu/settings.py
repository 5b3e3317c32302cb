"""Typed settings: frozen dataclasses that check themselves, read from YAML and from dotted overrides.

Nothing here knows what is configured; `gvu.config` does. A bad key or value is a `GvuError` that names the key, what
was given, what was expected and where it came from.
"""

import difflib
import inspect
import math
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml

from gvu.errors import GvuError

T = TypeVar("T")

RULES: dict[str, Callable[[float], bool]] = {
    "at least 0": lambda v: v >= 0,
    "at least 1": lambda v: v >= 1,
    "at least 2": lambda v: v >= 2,
    "above 0": lambda v: v > 0,
    "from 0 to 1": lambda v: 0 <= v <= 1,
    "above 0 and at most 1": lambda v: 0 < v <= 1,
    "at least 0 and below 1": lambda v: 0 <= v < 1,
}
"""The ranges that a number can be held to, by the words that the error uses."""


class BadValue(GvuError):
    """A setting that is ill-typed or out of range; `key` is relative to the component that found it."""

    def __init__(self, key: str, value: object, expected: str, origin: str = "") -> None:
        super().__init__(f"{key} is {value!r}, expected {expected}{origin}")
        self.key, self.value, self.expected = key, value, expected


def bounded(default: T, rule: str) -> T:
    """A numeric field that must obey one of `RULES`."""
    return cast("T", field(default=cast("Any", default), metadata={"rule": rule}))


@dataclass(frozen=True, kw_only=True)
class Component:
    """Base of all settings: on construction every field is checked against its type and its rule."""

    def __post_init__(self) -> None:
        hints = _hints(type(self))
        for f in fields(self):
            value = convert(hints[f.name], getattr(self, f.name), f.name)
            object.__setattr__(self, f.name, value)
            if "rule" in f.metadata:
                check(f.name, value, f.metadata["rule"])


def check(key: str, value: float, rule: str) -> None:
    """Hold a number to one of `RULES`.

    Raises:
        BadValue: it does not obey.
    """
    if not RULES[rule](value):
        raise BadValue(key, value, f"a number {rule}")


def convert(hint: Any, value: Any, key: str) -> Any:
    """`value` as the type `hint`: int becomes float, a list becomes a tuple, and nothing else is bent.

    Raises:
        BadValue: the value is not of that type.
    """
    origin = get_origin(hint)
    if hint is Any or (is_dataclass(hint) and isinstance(value, cast("type", hint))):
        return value
    if origin is Literal:
        fits = any(type(value) is type(option) and value == option for option in get_args(hint))
        return _accept(fits, value, hint, value, key)
    if origin in (Union, types.UnionType):
        return None if value is None else convert(_required(hint), value, key)
    if origin is tuple:
        return _tuple(hint, value, key)
    if origin is dict:
        _accept(isinstance(value, Mapping), value, hint, value, key)
        return {k: convert(get_args(hint)[1], v, f"{key}.{k}") for k, v in value.items()}
    return _scalar(hint, value, key)


def _accept(fits: bool, result: Any, hint: Any, value: Any, key: str) -> Any:
    if not fits:
        raise BadValue(key, value, describe(hint))
    return result


def _tuple(hint: Any, value: Any, key: str) -> tuple[Any, ...]:
    _accept(isinstance(value, list | tuple), value, hint, value, key)
    return tuple(convert(get_args(hint)[0], item, key) for item in value)


def _scalar(hint: Any, value: Any, key: str) -> Any:
    if hint is not float:
        return _accept(type(value) is hint, value, hint, value, key)
    try:  # YAML 1.1 reads 1e-6, without a point, as text
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    return _accept(math.isfinite(number), number, hint, value, key)


def _required(hint: Any) -> Any:
    return next(option for option in get_args(hint) if option is not types.NoneType)


def describe(hint: Any) -> str:
    """A type in the words of an error message."""
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(option) for option in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return f"{describe(_required(hint))}, or null"
    if get_origin(hint) is tuple:
        return f"a list, each {describe(get_args(hint)[0])}"
    if get_origin(hint) is dict:
        return f"a mapping from text to {describe(get_args(hint)[1])}"
    return words.get(hint, "a section of keys")


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def leaves(cls: type, prefix: str = "") -> dict[str, Any]:
    """Every setting of a nested dataclass by its dotted key, with its type, in order of declaration."""
    found: dict[str, Any] = {}
    for name, hint in ((f.name, _hints(cls)[f.name]) for f in fields(cls)):
        found |= leaves(cast("type", hint), f"{prefix}{name}.") if is_dataclass(hint) else {prefix + name: hint}
    return found


def docs(cls: type, prefix: str = "") -> dict[str, str]:
    """What every setting is for, by dotted key, from the `Attributes:` of the class docstrings."""
    texts = _attributes(cls)
    found: dict[str, str] = {}
    for name, hint in ((f.name, _hints(cls)[f.name]) for f in fields(cls)):
        found |= (
            docs(cast("type", hint), f"{prefix}{name}.") if is_dataclass(hint) else {prefix + name: texts.get(name, "")}
        )
    return found


def _attributes(cls: type) -> dict[str, str]:
    text = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^    (\w[\w, ]*): (.*(?:\n {5,}.*)*)", text, re.MULTILINE)
    return {name.strip(): " ".join(words.split()) for names, words in entries for name in names.split(",")}


# Reading --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One given setting: its dotted key, its raw value, and where it was given (for error messages)."""

    key: str
    value: Any
    origin: str


def load_config(cls: type[T], *, file: Path | None = None, overrides: Sequence[str] = ()) -> T:
    """Settings from defaults, then a YAML file, then `section.key=value` overrides; the later wins.

    Raises:
        GvuError: the file cannot be read; a key is unknown; a value is ill-typed or out of range.
    """
    hints = leaves(cls)
    given = [*(_from_file(hints, file) if file else ()), *(_from_override(hints, text) for text in overrides)]
    entries = {entry.key: entry for entry in given}
    guard = _Guard(entries)
    values = {key: guard(convert, hints[key], entry.value, key) for key, entry in entries.items()}
    return cast("T", _build(cls, values, guard))


@dataclass(frozen=True)
class _Guard:
    """Calls a function, and adds to a `BadValue` from it the full key and where the value was given."""

    entries: Mapping[str, _Entry]
    prefix: str = ""

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except BadValue as error:
            key = self.prefix + error.key
            entry = self.entries.get(key)
            origin = f" ({entry.origin})" if entry else ""
            raise BadValue(key, error.value, error.expected, origin) from None


def _build(cls: type, values: Mapping[str, Any], guard: _Guard) -> Any:
    own: dict[str, Any] = {}
    for name, hint in ((f.name, _hints(cls)[f.name]) for f in fields(cls)):
        key = guard.prefix + name
        if is_dataclass(hint):
            own[name] = _build(cast("type", hint), values, replace(guard, prefix=f"{key}."))
        elif key in values:
            own[name] = values[key]
    return guard(cls, **own)


def _from_file(hints: Mapping[str, Any], file: Path) -> Iterator[_Entry]:
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise GvuError(f"cannot read the config file {str(file)!r}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise GvuError(f"the config file {str(file)!r} is not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise GvuError(f"the config file {str(file)!r} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict | None):
        raise GvuError(f"the config file {str(file)!r} must hold a mapping of keys, not {describe(type(data))}")
    yield from _flatten(hints, data or {}, "", f"in {file}")


def _flatten(hints: Mapping[str, Any], data: Mapping[Any, Any], prefix: str, origin: str) -> Iterator[_Entry]:
    for name, value in data.items():
        key = f"{prefix}{name}"
        if key in hints:
            yield _Entry(key=key, value=value, origin=origin)
        elif not _is_section(hints, key):
            raise _unknown(hints, key, origin)
        elif isinstance(value, Mapping):
            yield from _flatten(hints, cast("Mapping[Any, Any]", value), f"{key}.", origin)
        elif value is not None:
            raise BadValue(key, value, "a section of keys", f" ({origin})")


def _from_override(hints: Mapping[str, Any], text: str) -> _Entry:
    key, equals, value = text.partition("=")
    if not equals:
        raise GvuError(f"{text!r} is not an override; write section.key=value, for example optim.lr=3e-4")
    origin = "on the command line"
    if key not in hints and _is_section(hints, key):
        raise BadValue(key, value, f"a section of keys, for example {_first(hints, key)}=...", f" ({origin})")
    if key not in hints:
        raise _unknown(hints, key, origin)
    return _Entry(key=key, value=_parse(hints[key], value, key), origin=origin)


def _parse(hint: Any, text: str, key: str) -> Any:
    """A value typed on the command line: text stays text, the rest is YAML; a list may be written a,b,c."""
    if get_origin(hint) in (Union, types.UnionType):
        return None if text.lower() in ("", "null", "none") else _parse(_required(hint), text, key)
    if hint is str or (get_origin(hint) is Literal and all(isinstance(option, str) for option in get_args(hint))):
        return text
    if get_origin(hint) is tuple and not text.startswith("["):
        return [part.strip() for part in text.split(",") if part.strip()]
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise BadValue(key, text, describe(hint), " (on the command line)") from None


def _is_section(hints: Mapping[str, Any], key: str) -> bool:
    return any(known.startswith(f"{key}.") for known in hints)


def _first(hints: Mapping[str, Any], section: str) -> str:
    return next(known for known in hints if known.startswith(f"{section}."))


def _unknown(hints: Mapping[str, Any], key: str, origin: str) -> GvuError:
    """The error for a key that does not exist, with the nearest one that does: by its last part, else by the whole."""
    near = difflib.get_close_matches(key, hints, n=1, cutoff=0.0)
    last = {known.rpartition(".")[2]: known for known in hints}
    same = difflib.get_close_matches(key.rpartition(".")[2], last, n=1, cutoff=0.7)
    best = last[same[0]] if same else near[0]
    return GvuError(f"unknown config key {key!r} ({origin}); the closest valid key is {best!r}")


# Writing --------------------------------------------------------------------------------------------------------------


def to_dict(config: Any) -> dict[str, Any]:
    """Settings as plain nested dictionaries, lists and scalars, ready for YAML or JSON."""
    return {f.name: _plain(getattr(config, f.name)) for f in fields(config)}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_dict(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in cast("tuple[Any, ...]", value)]
    return value


def to_yaml(config: Any, *, comments: bool = False) -> str:
    """Settings as YAML that `load_config` reads back to an equal object; `comments` adds what each key is for."""
    if not comments:
        return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
    return "\n".join(_commented(to_dict(config), docs(type(config)), "")) + "\n"


def _commented(data: Mapping[str, Any], texts: Mapping[str, str], prefix: str) -> Iterator[str]:
    indent = "  " * prefix.count(".")
    for name, value in data.items():
        if f"{prefix}{name}" in texts:
            dumped = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1000)
            text = dumped.removesuffix("...\n").strip()  # the marker that ends a document of one bare scalar
            yield f"{indent}# {texts[prefix + name]}"
            yield f"{indent}{name}: {text}"
        else:
            yield f"{indent}{name}:"
            yield from _commented(value, texts, f"{prefix}{name}.")
