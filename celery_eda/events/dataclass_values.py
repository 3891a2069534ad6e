"""Data of events, rebuilt from JSON as the dataclasses that they were, by their type hints."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

#: The classes of lists that JSON does not have.
LISTS = (tuple, set, frozenset)


def made(kind: Any, data: Any) -> Any:
    """An instance of the dataclass *kind* with *data* as JSON represents them.

    Dataclasses, pydantic models and enumerations are rebuilt at any depth: in lists, tuples, sets,
    dictionaries and unions.

    Raises:
        TypeError, ValueError: the data do not fit, or a type hint of nested data is unknown here.
    """
    if not isinstance(data, Mapping):
        raise TypeError(f"{type(data).__name__} is no mapping")
    hints = _hints_of(kind)
    computed = {each.name for each in fields(kind) if not each.init}
    return kind(
        **{
            name: _restored(hints[name], value) if name in hints else _flat(kind, name, value)
            for name, value in data.items()
            if name not in computed
        }
    )


def _hints_of(kind: Any) -> dict[str, Any]:
    """The type hints of *kind*; none if one of them names something that it does not import."""
    try:
        return get_type_hints(kind)
    except NameError:
        return {}


def _flat(kind: Any, name: str, value: Any) -> Any:
    """*value* of a field without a known hint, which may have no nested data to rebuild."""
    if isinstance(value, Mapping) or (isinstance(value, list) and any(map(_is_nested, value))):
        raise TypeError(
            f"the type hints of {kind.__name__} cannot be resolved, so {name} cannot be rebuilt; "
            "define or import their types at the top of the module, outside `if TYPE_CHECKING:`"
        )
    return value


def _is_nested(value: Any) -> bool:
    return isinstance(value, Mapping | list)


def _restored(hint: Any, value: Any) -> Any:
    """*value* as its type hint says; unchanged where the hint says nothing."""
    arguments, origin = get_args(hint), get_origin(hint) or hint
    if origin in (Union, UnionType):
        return _of_union(arguments, value)
    if not isinstance(origin, type) or value is None:
        return value
    if isinstance(value, Mapping):
        return _of_mapping(origin, arguments, value)
    if isinstance(value, list):
        return _of_list(origin, arguments, value)
    return origin(value) if issubclass(origin, Enum) else value


def _of_mapping(kind: Any, arguments: tuple[Any, ...], value: Mapping[str, Any]) -> Any:
    if is_dataclass(kind):
        return made(kind, value)
    if hasattr(kind, "model_validate"):
        return kind.model_validate(value)
    if len(arguments) == 2 and issubclass(kind, Mapping):
        return {name: _restored(arguments[1], each) for name, each in value.items()}
    return value


def _of_list(kind: Any, arguments: tuple[Any, ...], value: list[Any]) -> Any:
    if not issubclass(kind, Iterable) or issubclass(kind, str | bytes):
        return value
    if issubclass(kind, tuple) and arguments and arguments[-1] is not Ellipsis:
        items = [_restored(hint, each) for hint, each in zip(arguments, value, strict=True)]
    else:
        items = [_restored(arguments[0], each) for each in value] if arguments else value
    return kind(items) if kind in LISTS else items


def _of_union(arms: Collection[Any], value: Any) -> Any:
    """*value* as the first of *arms* that it fits."""
    for arm in arms:
        try:
            restored = _restored(arm, value)
        except (TypeError, ValueError):
            continue
        kind = get_origin(arm) or arm
        if isinstance(kind, type) and kind is not NoneType and isinstance(restored, kind):
            return restored
    return value
