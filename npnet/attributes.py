"""Attributes that would do nothing: Python takes ``optimizer.lr = 0.5`` without a word, and nobody reads it.

A class *knows* an attribute that it has itself, that it annotates, that npnet's own ``__init__`` sets, or that is
mentioned anywhere in the code of a class from outside npnet. Whatever else is set is refused, with the name that was
meant. Names that begin with an underscore are everybody's own.
"""

import dis
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from difflib import get_close_matches
from types import CodeType
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

Checks: TypeAlias = Mapping[str, Callable[[Any, str], Any]]
"""By the names of attributes: check(value, name) gives what is kept, or raises."""


def refuse_unknown_attribute(obj: Any, name: str, synonyms: Mapping[str, str]) -> None:
    """Refuse to set an attribute that would do nothing.

    Args:
        obj: what it would be set on.
        name: the attribute's.
        synonyms: what to use instead, by names that people may expect: PyTorch's, say.

    Raises:
        AttributeError: the object's class does not know it.
    """
    kind = type(obj)
    if name[:1] == "_" or name in vars(obj) or hasattr(kind, name):
        return
    for know in (_known_at_first, known_attributes):  # anew: methods may have been put on the class meanwhile
        known, own = know(kind)
        if name in own or "setattr" in own or (name in known and name not in synonyms):
            return
    raise AttributeError(_refusal(obj, name, synonyms), name=name, obj=obj)


def _refusal(obj: Any, name: str, synonyms: Mapping[str, str]) -> str:
    text = f"{type(obj).__name__} has no attribute {name!r}"
    if name in synonyms:
        hint = synonyms[name]
        return f"{text}: {hint}" if hint.startswith("npnet ") else f"{text}: use {hint}"
    there = sorted(each for each in vars(obj) if each[0] != "_")
    close = get_close_matches(name, {*there, *(each for each in dir(type(obj)) if each[0] != "_")}, 1)
    if close:
        return f"{text}: did you mean {close[0]}?"
    settings = f"; what can be set is {', '.join(there)}" if there else ""
    return f"{text}, and setting it would do nothing{settings} (for notes of your own: names that begin with _)"


def known_attributes(kind: type) -> tuple[set[str], set[str]]:
    """The attributes that npnet's classes among ``kind`` and its bases know, and those that the others know."""
    known, own = set[str](), set[str]()
    for each in kind.__mro__[:-1]:
        inside = each.__module__.partition(".")[0] == "npnet"
        names = known if inside else own
        with suppress(Exception):  # annotations may be code
            names |= set(each.__annotations__)
        for method, value in vars(each).items():
            for code in _codes(value):
                if not inside:
                    names |= _mentioned(code)
                elif method == "__init__":
                    names |= {step.argval for step in dis.get_instructions(code) if step.opname == "STORE_ATTR"}
    return known, own


_known_at_first = functools.lru_cache(maxsize=256)(known_attributes)  # an attribute of each new object asks it


def _codes(value: Any) -> Iterator[CodeType]:
    """The code of a method, however it is wrapped."""
    parts = (getattr(value, name, None) for name in ("fget", "fset", "fdel", "func", "__func__"))
    for each in (value, *parts):
        with suppress(ValueError):  # of a wrapper that wraps itself
            code = getattr(inspect.unwrap(each) if callable(each) else each, "__code__", None)
            if isinstance(code, CodeType):
                yield code


def _mentioned(code: CodeType) -> set[str]:
    """All names in it, those in texts (for setattr) and in inner functions, too."""
    names, constants = {*code.co_names, *code.co_varnames, *code.co_freevars}, list[Any](code.co_consts)
    for each in constants:
        if isinstance(each, CodeType):
            names |= _mentioned(each)
        elif isinstance(each, (tuple, frozenset)):
            constants += each
        elif isinstance(each, str):
            names.add(each)
    return names


class _Elsewhere:
    """A name that people may expect: reading it is an error that says ours.

    (A method ``__getattr__`` would do the same, and slow down every attribute of the object.)
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, obj: Any, kind: type) -> Any:
        if obj is None:  # the class has no such attribute
            raise AttributeError(f"type object {kind.__name__!r} has no attribute {self.name!r}")
        raise AttributeError(_refusal(obj, self.name, obj._synonyms), name=self.name, obj=obj)


class Settings:
    """An object whose attributes are settings: unknown ones are refused, and the others checked, whenever they are set.

    Raises:
        AttributeError: there is no such setting (it names the right one, where that can be guessed).
    """

    _synonyms: ClassVar[Mapping[str, str]] = {}
    """What to use instead of names that people may expect."""
    _checks: ClassVar[Checks] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in cls._synonyms:
            if not hasattr(cls, name):
                setattr(cls, name, _Elsewhere(name))

    if not TYPE_CHECKING:  # a type checker knows the attributes, and would believe that any can be set

        def __setattr__(self, name: str, value: Any) -> None:
            if name not in self.__dict__:
                refuse_unknown_attribute(self, name, self._synonyms)
            check = self._checks.get(name)
            object.__setattr__(self, name, value if check is None else check(value, name))
