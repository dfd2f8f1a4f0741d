"""What torch.onnx.export(dynamo=False), the TorchScript exporter, says of fastpool's ops: which exporter takes them."""

import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, NoReturn

from .arguments import OPS

_EXPORTER = "torch.onnx"


def _refuse(op: str, onnx: ModuleType) -> None:
    def symbolic(*_: Any, **__: Any) -> NoReturn:
        raise onnx.OnnxExporterError(
            f"fastpool.{op}: the TorchScript exporter, torch.onnx.export(dynamo=False), does not take fastpool's ops; "
            "write torch.onnx.export(..., dynamo=True, custom_translation_table=fastpool.onnx.translation_table()) "
            'after import fastpool.onnx (pip install "fastpool[onnx]")'
        )

    onnx.register_custom_op_symbolic(f"fastpool::{op}", symbolic, 1)  # for opset 1 and every later one


def _refuse_all(onnx: ModuleType) -> None:
    # The exporter is about to go, and a better error message is not worth a failing import of what is left.
    with suppress(Exception):
        for op in OPS:
            _refuse(op, onnx)


class _Loader(Loader):
    """The exporter's own, and then the refusals."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        # As if nobody had been there: for reloads, and for who pickles a spec or asks a loader for sources.
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _OnceImported)]
        self._loader.exec_module(module)
        _refuse_all(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


class _OnceImported(MetaPathFinder):
    """Waits for somebody to import the exporter, which takes as long as all of `import fastpool`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname == _EXPORTER else None
        if spec is None or spec.loader is None:
            return None
        spec.loader = _Loader(spec.loader)
        return spec


def refuse() -> None:
    """Makes it say so, now or once it is imported."""
    if _EXPORTER in sys.modules:
        _refuse_all(import_module(_EXPORTER))  # waits where another thread is still importing it
    else:
        sys.meta_path.insert(0, _OnceImported())
