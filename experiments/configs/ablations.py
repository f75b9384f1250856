"""The ablations of Chen et al. (2019, arXiv 1906.02735): the effects of unbiasedness and of LipSwish.

python -m experiments.density digits_truncated_elu      (or mnist_..., cifar10_... --data.dir DIR)
python -m experiments.density digits_elu

NAME_truncated_elu is an i-ResNet (five terms of the power series, ELU), and NAME_elu is a residual flow with ELU.
digits_uniform, mnist and cifar10 have LipSwish. `python -m experiments.studies.ablation` trains all three with several
seeds. Expected on digits, in this order: 1.910, 1.868, 1.856 test bits/dim. Published: MNIST 1.05, 1.00, 0.97; CIFAR-10
3.66 to 4.78, 3.32, 3.28. The runs on MNIST and CIFAR-10 have not been made with this library.
"""

from dataclasses import replace

from experiments.configs import cifar10, digits_uniform, mnist
from experiments.configs.base import DensityConfig
from resflow_jax import Truncated

_BASES = {"digits": digits_uniform.CONFIG, "mnist": mnist.CONFIG, "cifar10": cifar10.CONFIG}


def _with_elu(base: DensityConfig, name: str) -> DensityConfig:
    return replace(base, model=replace(base.model, activation="elu"), workdir=base.workdir.with_name(name))


CONFIGS = {f"{name}_elu": _with_elu(base, f"{name}_elu") for name, base in _BASES.items()} | {
    f"{name}_truncated_elu": replace(_with_elu(base, f"{name}_truncated_elu"), estimator=Truncated(terms=5))
    for name, base in _BASES.items()
}
