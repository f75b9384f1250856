"""The process that `experiments.benchmark` times: one case by one competitor.

    python -m experiments.studies.parts.competitors CASE COMPETITOR [jit | shard_map | pmap] [--authors CHECKOUT]

reads names of measures, one per line of standard input, and answers each by one line of JSON with seconds and further
figures. `compile` needs no data and makes no arrays.
"""

import argparse
import json
import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from experiments.configs.published import ESTIMATOR as TRAINING
from experiments.runs.devices import data_mesh, use_all_cores, use_compilation_cache, use_xla_flags
from experiments.runs.parts import PART, number_of_parts, over_devices, over_parts
from resflow_jax import Anderson, DenseTail, ImageFlowConfig, ImageTransform, ResidualFlow, Roulette
from resflow_jax.layers.lipschitz import LipschitzLinear
from resflow_jax.training.losses import dequantized_bits_per_dim
from resflow_jax.training.parallel import STRATEGIES, Strategy, make_mesh
from resflow_jax.training.placement import Placement
from resflow_jax.training.step import Trainer

Array = jax.Array

# The papers' estimator, which normflows uses too.
EVALUATION = replace(TRAINING, exact_terms=20)
LEARNING_RATE, CLIP = 1e-3, 1.0


@dataclass(frozen=True)
class Case:
    """A flow and a batch size."""

    config: ImageFlowConfig
    batch_size: int


CASES = {
    "28x28": Case(ImageFlowConfig((28, 28, 1), blocks=(4, 4, 4), hidden_channels=128), 32),
    "32x32": Case(
        ImageFlowConfig((32, 32, 3), blocks=(2, 2, 2), hidden_channels=512, data=ImageTransform(logit_alpha=0.05)), 16
    ),
    "digits": Case(ImageFlowConfig((8, 8, 1), blocks=(4, 4), hidden_channels=64, tail=DenseTail(hidden=64)), 64),
    "cifar10": Case(
        ImageFlowConfig((32, 32, 3), blocks=(16, 16, 16), hidden_channels=512, data=ImageTransform(logit_alpha=0.05)),
        64,
    ),
    "tiny": Case(ImageFlowConfig((4, 4, 1), blocks=(1,), hidden_channels=4, kernels=(3, 3), tail=DenseTail(0)), 4),
    "cifar10_2": Case(
        ImageFlowConfig((32, 32, 3), blocks=(2, 2, 2), hidden_channels=512, data=ImageTransform(logit_alpha=0.05)), 64
    ),
}
COMPETITORS = ("resflow_jax", "resflow_jax plain", "resflow_jax bfloat16", "authors", "normflows")
PEERS = ("authors", "normflows")  # in PyTorch
TIMED_FLOPS = 1e10  # of the products that measure the speed of a device


def photograph_crops(shape: tuple[int, int, int], number: int) -> np.ndarray:
    """Crops of the two photographs that scikit-learn ships: integers [number, *shape] with 256 levels."""
    from sklearn.datasets import load_sample_images

    height, width, channels = shape
    rng, photographs = np.random.default_rng(0), load_sample_images().images
    images = np.empty((number, *shape), np.uint8)
    for n in range(number):
        photograph = photographs[n % len(photographs)]
        i, j = (rng.integers(0, side - size) for side, size in zip(photograph.shape, (height, width), strict=False))
        images[n] = photograph[i : i + height, j : j + width, :channels]
    return images


def evaluation_flops(flow: ResidualFlow) -> float:
    """Floating-point operations of the matrix products in one evaluation of every block's g, for one example.

    It also takes an abstract flow, made by `nnx.eval_shape`.
    """
    total = 0.0
    for _, layer in nnx.iter_modules(flow):
        if isinstance(layer, LipschitzLinear):
            linear_map = layer.linear_map
            pixels = math.prod(linear_map.example_shape[:-1])
            total += 2.0 * pixels * math.prod(layer.kernel.shape)  # includes the blocks of a stack
    return total


def make_flow(case: Case, images: np.ndarray) -> ResidualFlow:
    """The flow of a case, initialised on its images."""
    flow = ResidualFlow(case.config, rngs=nnx.Rngs(0))
    flow.initialize(jnp.asarray((images + 0.5) / 256, jnp.float32))
    return flow


def make_trainer(graphdef: Any) -> Trainer:
    """A trainer of bits/dim for 256 levels, with Adam and clipping."""
    return Trainer(graphdef, dequantized_bits_per_dim(256), make_optimizer(), ema_decay=0.99)


def make_optimizer() -> optax.GradientTransformation:
    """Adam with clipping."""
    return optax.chain(optax.clip_by_global_norm(CLIP), optax.adam(LEARNING_RATE))


def compile_step(case: Case) -> dict[str, float]:
    """Seconds to trace and lower, and to compile, the training step of an abstract flow, and its memory."""
    flow = nnx.eval_shape(lambda: ResidualFlow(case.config, rngs=nnx.Rngs(0)))
    trainer = make_trainer(nnx.split(flow)[0])
    state = jax.eval_shape(lambda flow: trainer.create_state(flow, TRAINING), flow)
    images = jax.ShapeDtypeStruct((case.batch_size, *case.config.shape), jnp.uint8)
    began = time.perf_counter()
    lowered = trainer.compiled_step().lower(state, images, jax.random.key(0))
    middle = time.perf_counter()
    compiled = lowered.compile()
    return {
        "trace": middle - began,
        "compile": time.perf_counter() - middle,
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


class Ours:
    """resflow_jax with one device per core, which share each batch; training steps are divided as `parallel` says."""

    def __init__(self, case: Case, strategy: Strategy = "jit"):
        self.case, self.strategy = case, strategy
        self.images = photograph_crops(case.config.shape, case.batch_size)
        self.mesh = data_mesh(case.batch_size)
        self._log_prob, self._inverse = lru_cache(self._log_prob), lru_cache(self._inverse)
        self.key = self.train_key = jax.random.key(1)

    @cached_property
    def flow(self) -> ResidualFlow:
        return make_flow(self.case, self.images)

    @cached_property
    def placement(self) -> Placement:
        trainer = make_trainer(nnx.split(self.flow)[0])
        return Placement(trainer, make_mesh(devices=list(self.mesh.devices.flat)), self.strategy)

    @cached_property
    def step(self):
        self.state = self.placement.place(self.placement.trainer.create_state(self.flow, TRAINING))
        self.batch = self.placement.place_batch(self.images)
        return self.placement.step.lower(self.state, self.batch, self.train_key).compile()

    def train(self) -> dict[str, float]:
        """One training step; `flops` of its matrix products."""
        step = self.step
        began = time.perf_counter()
        self.state, metrics = jax.block_until_ready(step(self.state, self.batch, self.train_key))
        seconds = time.perf_counter() - began
        # forward, each product of the series, and six evaluations' worth in the backward pass
        flops = self.case.batch_size * evaluation_flops(self.flow)
        return {"seconds": seconds, "flops": flops * (7 + float(metrics["diagnostics"].length.mean()))}

    def _log_prob(self, estimator: Roulette) -> Callable[[Array, Array], Array]:
        return over_devices(lambda flow, x, key: flow.log_prob(x, key=key, estimator=estimator), self.flow)

    def evaluate(self, estimator: Roulette = EVALUATION) -> dict[str, float]:
        """log p of the batch with 20 terms and a roulette; `noise` is the standard deviation over keys."""
        x = (self.images + np.float32(0.5)) / 256
        self.key, *keys = jax.random.split(self.key, 3)
        results = [_timed(lambda key=key: self._log_prob(estimator)(x, key)) for key in keys]
        return {"seconds": min(r["seconds"] for r in results), "noise": _deviation(*(r["value"] for r in results))}

    def evaluate_default(self) -> dict[str, float]:
        """log p of the batch with the library's default estimator, `Roulette()`."""
        return self.evaluate(Roulette())

    def _inverse(self, solver: Anderson) -> Callable[[Array], Array]:
        parts = number_of_parts(self.case.batch_size, max(1, PART // self.flow.dim))
        apply = over_parts(lambda flow, z: flow.inverse(z, solver=solver, return_status=True)[0], self.flow)
        return lambda z: apply(z.reshape(parts, -1, z.shape[-1]))

    def sample(self, tolerance: str | None = None) -> dict[str, float]:
        """The inverse of z = f(x), by default with the default tolerance; `error` is max |x - f^-1(z)|."""
        inverse = self._inverse(Anderson() if tolerance is None else Anderson(tolerance=float(tolerance)))
        x = jnp.asarray((self.images + 0.5) / 256, jnp.float32)
        z = self.flow(x)
        result = _timed(lambda: inverse(z))
        return {"seconds": result["seconds"], "error": float(np.abs(np.subtract(result["value"], x)).max())}

    def matmul(self) -> dict[str, float]:
        """Operations per second of plain matrix products on all devices at once, the best of several shapes."""
        shapes = MATMULS if jax.default_backend() == "cpu" else ACCELERATOR_MATMULS
        return {"flops_per_second": max(_matmul_speed(self.mesh, *shape, self.case) for shape in shapes)}

    def peak_bytes(self) -> int | None:
        """The most memory of the accelerator that was in use; None on a CPU."""
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")

    def profile(self, directory: str) -> dict[str, float]:
        """Writes a trace of three training steps for TensorBoard or Perfetto."""
        self.train()
        with jax.profiler.trace(directory, create_perfetto_trace=True):
            return {"seconds": sum(self.train()["seconds"] for _ in range(3))}


class Plain(Ours):
    """resflow_jax as a plain script uses it: one device, no flags of XLA, jitted functions of the flow's arrays."""

    @cached_property
    def step(self) -> Callable[[Any, Array, Array], tuple[Any, dict[str, Any]]]:
        optimizer = make_optimizer()
        graphdef, params, others = nnx.split(self.flow, nnx.Param, ...)
        self.state = params, others, optimizer.init(params)
        self.batch = jnp.asarray((self.images + np.float32(0.5)) / 256)

        def loss(params, others, x, key):
            flow = nnx.merge(graphdef, params, others)
            log_prob, diagnostics = flow.log_prob(x, key=key, estimator=TRAINING, return_diagnostics=True)
            return -jnp.mean(log_prob), diagnostics

        @jax.jit
        def step(state, x, key):
            params, others, optimizer_state = state
            gradient, diagnostics = jax.grad(loss, has_aux=True)(params, others, x, key)
            updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
            flow = nnx.merge(graphdef, optax.apply_updates(params, updates), others)
            flow.update_norms()
            _, params, others = nnx.split(flow, nnx.Param, ...)
            return (params, others, optimizer_state), {"diagnostics": diagnostics}

        return step

    def _log_prob(self, estimator: Roulette) -> Callable[[Array, Array], Array]:
        graphdef, state = nnx.split(self.flow)

        @jax.jit
        def log_prob(state, x, key):
            return nnx.merge(graphdef, state).log_prob(x, key=key, estimator=estimator)

        return lambda x, key: log_prob(state, x, key)

    def _inverse(self, solver: Anderson) -> Callable[[Array], Array]:
        return partial(self.flow.inverse, solver=solver)


MATMULS = ((784, 128, 128), (1024, 512, 512), (2048, 2048, 2048))
ACCELERATOR_MATMULS = (*MATMULS, (65536, 512, 512), (8192, 8192, 8192))


def _matmul_speed(mesh: jax.sharding.Mesh, rows: int, inner: int, columns: int, case: Case) -> float:
    dtype = case.config.matmul_dtype or "float32"
    flops = 2.0 * rows * inner * columns
    times = max(1, int(TIMED_FLOPS / flops))

    def products(a, b):
        def step(b, _):
            product = jnp.matmul(a, b, preferred_element_type=jnp.float32)
            return b + (1e-30 * product[:1, :1]).astype(dtype), None

        return jax.lax.scan(step, b, None, length=times)[0]

    spec = PartitionSpec("data")
    run = jax.jit(jax.shard_map(products, mesh=mesh, in_specs=spec, out_specs=spec))
    a, b = (
        jax.device_put(jnp.ones((mesh.size * m, n), dtype), NamedSharding(mesh, spec))
        for m, n in ((rows, inner), (inner, columns))
    )
    jax.block_until_ready(run(a, b))
    return mesh.size * times * flops / min(_timed(lambda: run(a, b))["seconds"] for _ in range(5))


class Normflows:
    """The same flow in normflows, with PyTorch's default number of threads."""

    def __init__(self, case: Case):
        from experiments.studies.parts.peers import normflows_from

        self.images = photograph_crops(case.config.shape, case.batch_size)
        flow = make_flow(case, self.images)
        self._x = ((self.images + 0.5) / 256).astype(np.float32)
        self._peer = normflows_from(flow)
        self._papers = normflows_from(flow, papers=True)
        self._trained = normflows_from(flow, papers=True)
        self._trained.start_training(LEARNING_RATE, CLIP)

    def train(self) -> dict[str, float]:
        """One training step."""
        return {"seconds": _timed(lambda: self._trained.train_step(self._x))["seconds"]}

    def evaluate(self) -> dict[str, float]:
        """log p of the batch with 20 terms and a roulette; `noise` is its standard deviation."""
        results = [_timed(lambda: self._papers.log_prob(self._x)) for _ in range(2)]
        return {"seconds": min(r["seconds"] for r in results), "noise": _deviation(*(r["value"] for r in results))}

    def sample(self) -> dict[str, float]:
        """The inverse of z = f(x); `error` is max |x - f^-1(z)|."""
        z = self._peer.forward(self._x)
        result = _timed(lambda: self._peer.samples(z))
        return {"seconds": result["seconds"], "error": float(np.max(np.abs(result["value"] - self._x)))}

    def peak_bytes(self) -> int | None:
        """The most memory of the GPU that was in use; None on a CPU."""
        return self._peer.peak_bytes()


def _deviation(a: np.ndarray, b: np.ndarray) -> float:
    """Standard deviation of an estimate of an image's log p, from two estimates of every image."""
    return float(np.sqrt(np.mean(np.square(np.asarray(a) - np.asarray(b))) / 2))


def _timed(function: Callable[[], Any]) -> dict[str, Any]:
    began = time.perf_counter()
    value = jax.block_until_ready(function())
    return {"seconds": time.perf_counter() - began, "value": value}


def make_competitor(case: Case, name: str, strategy: Strategy = "jit", authors: Path | None = None) -> Any:
    """One of `COMPETITORS`; `authors` is a checkout of the authors' repository."""
    match name:
        case "normflows":
            return Normflows(case)
        case "authors":
            from experiments.studies.parts.authors import Authors

            images = photograph_crops(case.config.shape, case.batch_size)
            return Authors(case.config, images, authors, LEARNING_RATE, CLIP)
        case "resflow_jax plain":
            return Plain(case)
        case "resflow_jax bfloat16":
            case = replace(case, config=replace(case.config, matmul_dtype="bfloat16"))
    return Ours(case, strategy)


def main() -> None:
    """Answers the measures of one case and competitor until standard input ends."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.studies.parts.competitors",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("case", choices=CASES)
    parser.add_argument("competitor", choices=COMPETITORS)
    parser.add_argument("strategy", choices=STRATEGIES, nargs="?", default="jit")
    parser.add_argument("--authors", type=Path)
    given = parser.parse_args()
    answers, sys.stdout = sys.stdout, sys.stderr
    case, name = CASES[given.case], given.competitor
    if name != "resflow_jax plain":
        use_xla_flags()
        use_all_cores()
    use_compilation_cache()
    competitor = None
    for line in sys.stdin:
        measure, *arguments = line.split()
        if measure == "compile":
            answer = compile_step(case)
        else:
            competitor = competitor or make_competitor(case, name, given.strategy, given.authors)
            answer = getattr(competitor, measure)(*arguments)
        device = competitor and competitor.peak_bytes()
        answer["peak_bytes"] = device or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
