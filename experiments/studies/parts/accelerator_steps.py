"""The process that `experiments.studies.accelerators` compiles a step in: for TPUs, on a machine that needs none.

    python -m experiments.studies.parts.accelerator_steps CASE PATH

CASE is a `StepCase` in JSON. It writes the optimised program to PATH.hlo.gz, and what the compiler says to PATH.json.
No array is made: flow, state and batch are abstract.
"""

import gzip
import importlib.util
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.configs import CONFIGS
from experiments.configs.base import DensityConfig
from experiments.configs.tiny import tiny
from experiments.runs.devices import use_xla_flags
from experiments.runs.workdir import write_atomically
from resflow_jax import ResidualFlow
from resflow_jax.functional.primitives.platforms import compiling_for
from resflow_jax.io.config_json import as_json
from resflow_jax.io.whole_files import whole_file
from resflow_jax.training.losses import dequantized_bits_per_dim
from resflow_jax.training.parallel import make_mesh
from resflow_jax.training.placement import Placement
from resflow_jax.training.scores import bits_per_dim_of
from resflow_jax.training.step import Trainer

What = Literal["train", "evaluate", "sample"]
Kind = Literal["v5e", "v5p"]
Parameters = Literal["replicated", "full"]

# The smallest slice with so many chips; of a single one, that of a host. On v5p a chip is one device.
TOPOLOGIES = {
    "v5e": {1: "2x2x1", 4: "2x2x1", 8: "2x4x1", 16: "4x4x1", 64: "8x8x1", 256: "16x16x1"},
    "v5p": {1: "2x2x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 64: "4x4x4", 256: "4x8x8"},
}


@dataclass(frozen=True)
class StepCase:
    """One program.

    Attributes:
      config: name of a run on images.
      what: the training step, log p of a batch with the estimator of evaluation, or the inverse of a batch of latents.
      kind: "v5e", "v5p", or "cpu".
      chips: number of chips, among which the batch is divided.
      parameters: layout of the training state, as in `jit_train_step`.
      batch_size: images a chip.
      tiny: whether the flow is that of `--tiny`.
    """

    config: str
    what: What
    kind: str
    chips: int
    parameters: Parameters
    batch_size: int
    tiny: bool = False

    @property
    def name(self) -> str:
        """Of its files."""
        words = self.config, self.what, self.kind, self.chips, self.parameters, self.batch_size
        return "_".join(map(str, words)) + "_tiny" * self.tiny

    @property
    def settings(self) -> DensityConfig:
        """The config that it names."""
        return tiny(CONFIGS[self.config]) if self.tiny else CONFIGS[self.config]


def settings_of(case: StepCase) -> Any:
    """Its settings as a JSON file has them."""
    return json.loads(json.dumps(as_json(case.settings)))


def libtpu() -> Path | None:
    """The library of XLA's TPU compiler: $TPU_LIBRARY_PATH, or that of the package libtpu."""
    named = os.environ.get("TPU_LIBRARY_PATH")
    spec = None if named else importlib.util.find_spec("libtpu")
    path = Path(named) if named else spec and spec.origin and Path(spec.origin).parent / "libtpu.so"
    return path if path and path.exists() else None


def how_to_install() -> str:
    """What to type for the libtpu that matches this JAX."""
    needed = next((word.split(";")[0].strip() for word in requires("jax") or () if word.startswith("libtpu")), None)
    return 'pip install "jax[tpu]"' + (f", or pip install '{needed}' alone" if needed else "")


def environment(kind: str) -> dict[str, str]:
    """The variables with which the process starts. JAX itself runs on the CPU."""
    variables = dict(os.environ) | {"JAX_PLATFORMS": "cpu"}
    if kind == "cpu":
        return variables
    path = libtpu()
    if path is None:
        raise ImportError(f"kind: expected the package libtpu to compile for {kind}, got none; {how_to_install()}")
    return variables | {
        "TPU_LIBRARY_PATH": str(path),
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing here uses a chip, which is what the library's lock protects
    }


def mesh_of(case: StepCase) -> Mesh:
    """The chips of a case."""
    if case.kind == "cpu":
        return make_mesh(devices=jax.devices()[: case.chips])
    name = f"{case.kind}:{TOPOLOGIES[case.kind][case.chips]}"
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    return make_mesh(devices=devices[: case.chips])


def lowered(case: StepCase) -> jax.stages.Lowered:
    """The program of a case, before it is compiled."""
    flow = nnx.eval_shape(lambda: ResidualFlow(case.settings.model, rngs=nnx.Rngs(case.settings.seed)))
    return {"train": _train, "evaluate": _evaluate, "sample": _sample}[case.what](case, flow, mesh_of(case))


def _train(case: StepCase, flow: ResidualFlow, mesh: Mesh) -> jax.stages.Lowered:
    """As `runs.setup.set_up` and `place_on_devices` make it, without data."""
    config = case.settings
    weight = optax.linear_schedule(0.0, 1.0, config.annealing) if config.annealing else None
    loss, accumulate = dequantized_bits_per_dim(2**config.data.bits, weight), config.optimizer.accumulate
    optimizer = config.optimizer.build(config.steps)
    trainer = Trainer(nnx.split(flow)[0], loss, optimizer, config.optimizer.ema_decay, accumulate)
    placement = Placement(trainer, mesh, "jit", case.parameters)
    state = jax.eval_shape(lambda flow: trainer.create_state(flow, config.estimator), flow)
    state = jax.tree.map(_placed, state, placement.shardings(state))
    batches = () if accumulate == 1 else (accumulate,)
    return placement.step.lower(state, _images(case, mesh, *batches), _key(mesh))


def _evaluate(case: StepCase, flow: ResidualFlow, mesh: Mesh) -> jax.stages.Lowered:
    """As `resflow_jax.training.evaluation` makes it: bits/dim of dequantised images, [B]."""
    graphdef, state = nnx.split(flow)
    score, whole, slices = bits_per_dim_of(2**case.settings.data.bits), PartitionSpec(), PartitionSpec("data")

    def scores(state, images, key):
        return score(nnx.merge(graphdef, state), images, key, case.settings.evaluation.estimator)[1]

    apply = jax.shard_map(scores, mesh=mesh, in_specs=(whole, slices, whole), out_specs=slices)
    return jax.jit(apply).lower(_whole(state, mesh), _images(case, mesh), _key(mesh))


def _sample(case: StepCase, flow: ResidualFlow, mesh: Mesh) -> jax.stages.Lowered:
    """As `runs.sampling.decoder` makes it: f^-1(z), clipped, and whether each solve converged."""
    graphdef, state = nnx.split(flow)
    whole, slices = PartitionSpec(), PartitionSpec("data")

    def decode(state, z):
        flow = nnx.merge(graphdef, state)
        x, status = flow.inverse(z.reshape(-1, *flow.latent_shape), return_status=True)
        return x if flow.support is None else jnp.clip(x, *flow.support), status.converged.all(axis=0)

    apply = jax.shard_map(decode, mesh=mesh, in_specs=(whole, slices), out_specs=slices, check_vma=False)
    z = jax.ShapeDtypeStruct((case.chips * case.batch_size, flow.dim), flow.dtype)
    return jax.jit(apply).lower(_whole(state, mesh), _placed(z, NamedSharding(mesh, slices)))


def _placed(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _whole(tree: Any, mesh: Mesh) -> Any:
    return jax.tree.map(lambda leaf: _placed(leaf, NamedSharding(mesh, PartitionSpec())), tree)


def _key(mesh: Mesh) -> Any:
    return _whole(jax.eval_shape(lambda: jax.random.key(0)), mesh)


def _images(case: StepCase, mesh: Mesh, *batches: int) -> jax.ShapeDtypeStruct:
    shape = *batches, case.chips * case.batch_size, *case.settings.model.shape
    spec = PartitionSpec(*[None] * len(batches), "data")
    return jax.ShapeDtypeStruct(shape, np.uint8, sharding=NamedSharding(mesh, spec))


def compile_step(case: StepCase, path: Path) -> None:
    """Lowers and compiles, and writes PATH.hlo.gz and then PATH.json."""
    began = time.perf_counter()
    with compiling_for("cpu" if case.kind == "cpu" else "tpu"):
        program = lowered(case)
    middle = time.perf_counter()
    compiled = program.compile()
    end = time.perf_counter()
    memory, analysis = compiled.memory_analysis(), compiled.cost_analysis() or {}
    with whole_file(f"{path}.hlo.gz") as temporary, gzip.open(temporary, "wt", compresslevel=6) as file:
        file.write(compiled.as_text())
    result = {
        "case": asdict(case),
        "settings": settings_of(case),
        "seconds": {"lower": middle - began, "compile": end - middle},
        "memory": {
            name: getattr(memory, f"{name}_size_in_bytes") for name in ("temp", "argument", "output", "generated_code")
        },
        "cost_analysis": {name: analysis.get(name) for name in ("flops", "bytes accessed")},
        "versions": {"jax": jax.__version__, "libtpu": _version("libtpu")},
    }
    write_atomically(path.with_name(f"{path.name}.json"), json.dumps(result, indent=2) + "\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> None:
    """Compiles the case of the command line."""
    case, path = sys.argv[1:]
    use_xla_flags()  # they are of the CPU's compiler
    compile_step(StepCase(**json.loads(case)), Path(path))


if __name__ == "__main__":
    main()
