"""What torch.onnx.export(dynamo=False), the TorchScript exporter, says of fastpool's ops: which exporter takes them."""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
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
    if hasattr(onnx, "register_custom_op_symbolic"):  # which goes when that exporter does
        for op in OPS:
            _refuse(op, onnx)


class _OnceImported(MetaPathFinder):
    """Waits for somebody to import the exporter, which takes as long as all of `import fastpool`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname == _EXPORTER else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def and_refuse(module: ModuleType) -> None:
            execute(module)
            sys.meta_path.remove(self)
            _refuse_all(module)

        spec.loader.exec_module = and_refuse  # type: ignore[method-assign]
        return spec


def refuse() -> None:
    """Makes it say so, now or once it is imported."""
    if _EXPORTER in sys.modules:
        _refuse_all(sys.modules[_EXPORTER])
    else:
        sys.meta_path.insert(0, _OnceImported())
