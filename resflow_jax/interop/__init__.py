"""Bridges to other libraries. Each is a submodule that is imported when it is first used.

    rf.interop.distrax     A flow as a bijector of distrax, and through it of TFP on JAX.
    rf.interop.numpyro     A flow as a transform, a distribution and a variational family of NumPyro.
    rf.interop.flowjax     A flow as a bijection of flowjax, and residual blocks around networks of Equinox.
    rf.interop.stateless   A flow as pure functions of parameters in a plain dict.

The first three need the extra of the same name. In these libraries forward is the direction of sampling: it maps z to
x, where `Flow.forward` maps x to z.

`rf.load_torch_checkpoint` reads checkpoints of the authors' PyTorch implementation, and `rf.save_torch_checkpoint`
writes them. `interop.torch.flow` has what only their flows have, such as a classifier. `rf.save` and `rf.load` write
and read this library's own files.

Example:
  >>> sorted(rf.interop.__all__)
  ['distrax', 'flowjax', 'numpyro', 'stateless']
"""

from importlib import import_module
from types import ModuleType

__all__ = ["distrax", "flowjax", "numpyro", "stateless"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
