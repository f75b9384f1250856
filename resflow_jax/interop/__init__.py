"""Bridges to other libraries: each a submodule that is imported at first use, most of them an optional extra.

    rf.interop.distrax     a flow as a bijector of distrax, and through it of TFP on JAX
    rf.interop.numpyro     as a transform, a distribution and a variational family of NumPyro
    rf.interop.flowjax     as a bijection of flowjax; residual blocks around networks of Equinox
    rf.interop.stateless   as pure functions of parameters in a plain dict; needs no extra

Files of a flow are written by `rf.save` and read by `rf.load`. Checkpoints of the authors' PyTorch implementation are
read by `rf.load_torch_checkpoint` and written by `rf.save_torch_checkpoint`; what only their flows have, as a
classifier, is in `interop.torch.flow`. In the first three of these libraries the direction is that of sampling: forward
maps z to x, where `Flow.forward` maps x to z.
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
