"""Runs a forward and notes what its Python code reads: attributes, globals, closures, functions.

Every instruction of code that is neither PyTorch's nor the standard library's is looked at before it runs. What it may load
is listed here; a forward that loads anything else, or that changes what outlives the call, is stopped with a reason.
"""

from __future__ import annotations

import builtins
import dis
import enum
import gc
import logging
import operator
import sys
import typing
from collections.abc import Callable, Mapping
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import fx, nn

from .allowed import (
    BUILTINS,
    BY_NAME,
    CONSTANTS_OF_CLASSES,
    HARMLESS,
    LEVELS,
    MODULE_METHODS,
    NORM,
    OF_EVERY_MODULE,
    PURE,
    UNSTEADY,
    is_strangers,
    on_tensors,
    root_of,
)
from .child_queries import COMPARING, COMPARISONS, TELLING, Children
from .instructions import MONITORING, Instructions, catches, instructions_of
from .watch import Absent, ChildPath, Foldable, Level, Present, Watched, cell_of, has_own, in_class, is_immutable

_UNKNOWN = object()
_CONSTANT = ("LOAD_CONST", "LOAD_SMALL_INT")


class Refused(BaseException):
    """Ends a forward that does what can't be watched. No ``except Exception`` in it holds this up."""


class LayerForward:
    """The forward of a layer, which is no Python code to look into."""


class Observer:
    """What one run of a module's forward reads. ``paths`` has the path of each module that it may read, by its id."""

    def __init__(self, paths: Mapping[int, ChildPath], modules: list[nn.Module]):
        self.paths, self.modules = paths, modules
        self.watched = Watched()
        self.modes: set[ChildPath] = set()
        """Of the modules of which it reads whether they train."""
        self.reason: str | None = None
        self.known: set[CodeType] = set()
        self.functions: set[int] = set()
        self.tops: dict[FrameType, tuple[Any, str]] = {}
        self.instructions = Instructions(self._before)

    def run(self, function: Callable[[], Any]) -> Any:
        """``function()``, observed.

        Raises:
            Refused: it did what can't be watched; ``reason`` says what.
        """
        call = nn.Module.__call__  # somebody may have replaced it by Python code of theirs, as tracers do
        self.plain = {getattr(call, "__code__", None)}
        before, collects = sys.gettrace(), gc.isenabled()
        try:  # all of it: an interrupt may come where any call ends
            gc.disable()  # what a collection runs, such as the end of somebody's generator, is no part of the forward
            self.instructions.start()
            for module in self.modules:
                self.instructions.of(getattr(getattr(module, "forward", None), "__code__", None))
            sys.settrace(self._enter)
            out = function()
        finally:
            sys.settrace(before)
            self.instructions.stop()
            if collects:
                gc.enable()
        if self.reason is not None:
            raise Refused(self.reason)
        return out

    def refuse(self, reason: str) -> typing.NoReturn:
        self.reason = self.reason or reason
        # the first: what a refusal ends is refused in turn, where Python tells of its end
        raise Refused(self.reason)

    # ---- frames and instructions

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        where = frame.f_globals.get("__name__")
        if event != "call" or not is_strangers(where) or code in self.plain or (where, code.co_name) in HARMLESS:
            return None
        if code.co_argcount:
            first = frame.f_locals.get(code.co_varnames[0])
            if isinstance(first, nn.Module) and id(first) in self.paths:
                self._of_module(first, "forward")
        if code not in self.known:
            self.refuse(f"runs {code.co_name}, which is no plain function or method that can be watched")
        if catches(code):
            self.refuse(f"catches exceptions in {code.co_name}")
        frame.f_trace_opcodes, frame.f_trace_lines = MONITORING is None, False
        return self._step

    def _step(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "opcode":
            self._before(frame)
        elif event == "exception" and argument[0] is GeneratorExit:  # none of its instructions needs to run any more
            self.tops.setdefault(frame, (_UNKNOWN, "…"))
        elif event == "return" and self.tops.pop(frame, None) is None:
            self.refuse(f"runs {frame.f_code.co_name} without being seen by sys.settrace")
        return self._step

    def _before(self, frame: FrameType) -> None:
        """Called before each instruction of a frame; those of other threads, which run the same code, aren't traced."""
        if frame.f_trace != self._step:
            return
        places, instructions = instructions_of(frame.f_code)
        place = places.get(frame.f_lasti)
        if place is not None:
            known = self._instruction(frame, instructions, place)
            self.tops[frame] = known

    def _instruction(self, frame: FrameType, instructions: list[dis.Instruction], place: int) -> tuple[Any, str]:
        """Judges one, and returns what it leaves on top of the stack, if that is known, and what it is called."""
        instruction = instructions[place]
        name, argument = instruction.opname, instruction.argval
        if name.startswith("LOAD_FAST"):
            local = argument[-1] if type(argument) is tuple else argument
            return frame.f_locals.get(local, _UNKNOWN), local
        if name in ("LOAD_GLOBAL", "LOAD_NAME"):
            return self._global(frame, argument, instructions[place + 1 : place + 6]), argument
        if name in ("LOAD_DEREF", "LOAD_CLOSURE", "LOAD_CLASSDEREF"):
            return frame.f_locals.get(argument, _UNKNOWN), argument
        top, text = self.tops.get(frame, (_UNKNOWN, "…"))
        if name in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "IMPORT_FROM"):
            value = _UNKNOWN if name == "LOAD_SUPER_ATTR" else top
            found = self._attribute(value, argument, f"{text}.{argument}")
            return (value, text) if name == "IMPORT_FROM" else (found, f"{text}.{argument}")
        if name == "IMPORT_NAME":
            if argument not in sys.modules or is_strangers(argument):
                self.refuse(f"imports {argument}")
            self._value(sys.modules[argument], f"the module {argument}")
            return sys.modules[root_of(argument)], root_of(argument)
        if name == "STORE_DEREF" and argument in frame.f_code.co_freevars:
            self.refuse(f"changes {argument}, a variable of the function around it")
        if name in ("IS_OP", "COMPARE_OP") and isinstance(top, nn.Module):
            self.refuse(f"compares {text}, a module, with something")
        constant = name.endswith("_OP") and instructions[place - 1].opname.startswith(_CONSTANT)
        if name in COMPARISONS and not constant and (top is _UNKNOWN or not name.endswith("_OP")):
            self.watched.looks = True  # what it compares may be modules
        if name in ("MATCH_CLASS", "LOAD_BUILD_CLASS", "LOAD_LOCALS", "IMPORT_STAR"):
            self.refuse(f"contains {name}")
        if instruction.opcode in dis.hasname:
            self.refuse(f"changes {argument}")
        return _UNKNOWN, "…"

    def _global(self, frame: FrameType, name: str, following: list[dis.Instruction]) -> Any:
        if name in frame.f_globals:
            value = self.watched.of(frame.f_globals, name)
            self.watched.looks |= getattr(value, "__name__", None) in COMPARING
            self._value(value, f"the global {name}")
            return value
        value = getattr(builtins, name, _UNKNOWN)
        self.watched.looks |= name in TELLING
        self.watched.of(frame.f_globals, name)  # it may hide the builtin later
        if name in BY_NAME or name == "type":
            self._by_name(frame, name, following)
        elif name not in BUILTINS and name not in ("True", "False", "None"):
            self.refuse(f"calls {name}")
        return value

    def _by_name(self, frame: FrameType, function: str, following: list[dis.Instruction]) -> None:
        """``getattr(self.a.b, "name", …)``, ``hasattr`` alike, and ``type(self)``."""
        top: Any = _UNKNOWN
        for instruction in following:
            name, argument = instruction.opname, instruction.argval
            if name.startswith("LOAD_FAST") or name == "LOAD_DEREF":
                top = frame.f_locals.get(argument, _UNKNOWN)
                if function == "type" and isinstance(top, nn.Module):
                    return
            elif name in ("LOAD_ATTR", "LOAD_METHOD"):
                top = self._attribute(top, argument, argument)
            elif name == "LOAD_CONST" and type(argument) is str and function in BY_NAME and isinstance(top, nn.Module):
                self._attribute(top, argument, argument)
                return
            else:
                break
        self.refuse(f"calls {function} on what can't be told beforehand")

    # ---- attributes

    def tells_children(self, module: nn.Module) -> None:
        """From now on it is told where the forward looks at which children ``module`` has."""

        def looked(how: str) -> None:
            self.watched.looks = True
            if how == "prints" or (module._modules and isinstance(module.__dict__.get("forward"), LayerForward)):
                self.refuse(f"{how} {'.'.join(self.paths[id(module)]) or 'itself'}, which may change inside")

        module.__dict__["_modules"] = Children(module._modules, looked)

    def _attribute(self, top: Any, name: str, text: str) -> Any:
        """The attribute of ``top``, where that is known without running anything."""
        self.watched.looks |= name == "__class__" or name in COMPARING or (top is builtins and name in TELLING)
        if isinstance(top, nn.Module):
            if id(top) not in self.paths:
                self.refuse(f"uses {text.rpartition('.')[0]}, a module that is none of its children")
            if isinstance(top.__dict__.get("forward"), LayerForward) and name in top._modules:
                self.refuse(f"looks into {'.'.join(self.paths[id(top)])}, which may change inside")
            return self._of_module(top, name)
        if isinstance(top, ModuleType):
            return self._of_python_module(top, name, text)
        if isinstance(top, type):
            return self._of_class(top, name, text)
        if isinstance(top, fx.Proxy):
            if name.startswith("__"):
                self.refuse(f"reads {name} of a tensor")
            return _UNKNOWN
        if isinstance(top, logging.Logger) and name in LEVELS:
            if self.watched.of(Level(top, LEVELS[name]), "enabled"):
                self.refuse(f"writes into a log by {text}")
            return _UNKNOWN
        if isinstance(top, logging.Logger):
            self.refuse(f"reads {text}")
        if isinstance(top, FunctionType) and name not in CONSTANTS_OF_CLASSES:
            self.refuse(f"reads {text}, an attribute of a function")
        if top is _UNKNOWN:  # it may be a module's
            if name in vars(nn.Module) and name not in MODULE_METHODS and not hasattr(torch.Tensor, name):
                self.refuse(f"calls {name} of a module")
            for module in self.modules:
                if has_own(module, name):
                    self._of_module(module, name)
        elif isinstance(top, torch.Tensor):
            self.refuse(f"reads {text}, of a tensor that is not computed from its input")
        return _UNKNOWN

    def _of_module(self, module: nn.Module, name: str) -> Any:
        path, kind, state = self.paths[id(module)], type(module), module.__dict__
        what = ".".join((*path, name))
        if name == "forward" and isinstance(state.get(name), LayerForward):
            return _UNKNOWN
        if name == "__class__":
            return kind
        of_class = in_class(kind, name)
        if name in OF_EVERY_MODULE:
            if name not in ("training", "_modules"):
                self.refuse(f"reads its {name}")
            if name == "training":
                self.modes.add(path)
            return _UNKNOWN
        if isinstance(of_class, property):
            self.watched.of(kind, name)
            self._function(of_class.fget, what)
            return _UNKNOWN
        if name in state:
            value = state[name]
            function = value.__func__ if isinstance(value, MethodType) and value.__self__ is module else value
            self.watched.attribute(path, name, function)
            self.watched.of(kind, name)  # a property that comes later hides it
            if isinstance(value, torch.Tensor):
                self.refuse(f"reads {what}, a tensor whose values may change")
            if not is_immutable(function):
                self.refuse(f"reads its attribute {what}, a {type(value).__name__}, whose contents may change")
            self._value(function, f"its attribute {what}")
            return value
        if name != "forward":  # a forward on the instance is asked for by itself
            self.watched.attribute(path, name, Absent)
        if of_class is not Absent:
            self.watched.of(kind, name)
            return self._of_its_class(module, name, of_class, what)
        if state["_parameters"].get(name) is not None or state["_buffers"].get(name) is not None:
            self.refuse(f"reads {what}, a tensor whose values may change")
        child = state["_modules"].get(name, Absent)
        if child is None:
            self.watched.attribute(path, name, None)
        elif child is not Absent:
            self.watched.attribute(path, name, Foldable if isinstance(child, NORM) else Present)
        return _UNKNOWN if child is Absent else child

    def _of_its_class(self, module: nn.Module, name: str, value: Any, what: str) -> Any:
        kind = type(module)
        for base in kind.__mro__:  # all that have it: super() may mean any of them
            if name not in vars(base):
                continue
            if root_of(base.__module__) in ("torch", "builtins"):
                if name not in MODULE_METHODS:
                    self.refuse(f"calls {what} of {base.__name__}")
                continue
            self.watched.of(base, name)
            theirs = vars(base)[name]
            function = getattr(theirs, "__func__", theirs)
            if isinstance(theirs, property):
                function = theirs.fget
            if isinstance(function, FunctionType):
                self._function(function, what)
            elif not is_immutable(theirs):
                self.refuse(f"reads the class's attribute {what}, a {type(theirs).__name__}, whose contents may change")
        return value if is_immutable(value) else _UNKNOWN

    def _of_python_module(self, module: ModuleType, name: str, text: str) -> Any:
        value = self.watched.of(vars(module), name)
        if value is not Absent:
            self._value(value, text)
        return value

    def _of_class(self, kind: type, name: str, text: str) -> Any:
        if name in CONSTANTS_OF_CLASSES:
            return _UNKNOWN
        value = in_class(kind, name)
        if root_of(kind.__module__) == "torch" or kind.__module__ == "builtins":
            if value not in on_tensors() and name not in MODULE_METHODS:
                self.refuse(f"reads {text}")
            return _UNKNOWN
        if isinstance(kind, enum.EnumMeta):
            return self.watched.of(kind, name)
        self.watched.of(kind, name)
        function = getattr(value, "__func__", value)
        if isinstance(function, FunctionType):
            self._function(function, text)
        elif not is_immutable(value):
            self.refuse(f"reads {text}, a {type(value).__name__}, whose contents may change")
        return value

    # ---- values

    def _value(self, value: Any, what: str) -> None:
        """Judges what a global, an attribute or a closure holds."""
        if isinstance(value, FunctionType):
            if value in on_tensors() or value.__module__ == "torch.nn.functional":
                return
            if root_of(value.__module__) == "torch":
                self.refuse(f"calls {what}")
            elif (value.__module__, value.__name__) in HARMLESS:
                return
            elif is_strangers(value.__module__) or value.__module__ is None:
                self._function(value, what)
            elif sys.modules.get(value.__module__) not in PURE:
                self.refuse(f"calls {what}")
        elif isinstance(value, ModuleType):
            if not is_strangers(value.__name__) and root_of(value.__name__) != "torch" and value not in PURE:
                self.refuse(f"uses the module {value.__name__}")
            if root_of(value.__name__) in UNSTEADY:
                self.refuse(f"uses the module {value.__name__}")
        elif isinstance(value, type):
            layer = issubclass(value, nn.Module)
            if root_of(value.__module__) == "torch" and not layer and not issubclass(value, enum.Enum):
                self.refuse(f"uses {what}")
            if value in (operator.attrgetter, operator.methodcaller):
                self.refuse(f"uses {what}")
        elif isinstance(value, BuiltinFunctionType) or type(value) is type(torch.Tensor.add):
            pure = getattr(value, "__module__", None) in {m.__name__ for m in PURE} | {"_operator", "_functools"}
            if value not in on_tensors() and not (pure and what.rpartition(".")[2] not in BY_NAME):
                self.refuse(f"calls {what}")
        elif isinstance(value, logging.Logger):
            pass  # of which only the entries that it doesn't take are let through
        elif not is_immutable(value):
            self.refuse(f"reads {what}, a {type(value).__name__}, whose contents may change")

    def _function(self, function: Any, what: str) -> None:
        """A function that may run: its code is looked at when it does; here, what it holds."""
        if not isinstance(function, FunctionType):
            self.refuse(f"calls {what}, a {type(function).__name__}")
        if id(function) in self.functions or not is_strangers(function.__globals__.get("__name__")):
            if function.__code__ not in self.known and root_of(function.__globals__.get("__name__")) == "torch":
                self.refuse(f"is wrapped in {function.__code__.co_qualname} of PyTorch")
            return
        self.functions.add(id(function))
        code = self.watched.of(function, "__code__")
        defaults = self.watched.of(function, "__defaults__") or ()
        keywords = self.watched.of(function, "__kwdefaults__") or {}
        if not all(map(is_immutable, (*defaults, *keywords.values()))):
            self.refuse(f"calls {what}, one of whose default arguments may change")
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            value = cell_of(cell)
            if name != "__class__" and value is not Absent:
                self.watched.of(cell, "cell_contents")
                if not is_immutable(value) and not isinstance(value, ModuleType):
                    self.refuse(f"reads {name}, a variable of the function around it")
                self._value(value, f"{name}, a variable of the function around it")
        codes = [code]
        while codes:
            each = codes.pop()
            self.known.add(each)
            self.instructions.of(each)
            codes += [constant for constant in each.co_consts if isinstance(constant, CodeType)]
