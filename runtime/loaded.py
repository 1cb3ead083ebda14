"""`load(build)`: an artifact ready to run. Logits, text generation, and single steps for tests."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from qcn_compile.artifact import Manifest, read_manifest
from qcn_compile.errors import ArtifactError, QcnError, UsageError
from qcn_compile.runtime.cuda.device import CudaDevice
from qcn_compile.runtime.cuda.executable import CudaExecutable
from qcn_compile.runtime.device import CpuDevice
from qcn_compile.runtime.engine import Engine, EngineConfig, check_tokens
from qcn_compile.runtime.executable import Executable
from qcn_compile.runtime.memory import MemoryPlan, memory_bytes, plan_memory, shared_budget, weight_file_bytes
from qcn_compile.runtime.opening import close, open_cpu, open_gpus, runnable
from qcn_compile.runtime.output import Output
from qcn_compile.runtime.prefix.build import prefix_cache
from qcn_compile.runtime.prefix.options import PrefixOptions
from qcn_compile.runtime.ragged import RaggedSequences
from qcn_compile.runtime.request import SamplingParams
from qcn_compile.runtime.rope import apply, rope_override
from qcn_compile.runtime.routing import Routing, check
from qcn_compile.runtime.speculation.mtp import MtpDrafter
from qcn_compile.runtime.speculation.ngram import LookupDrafter
from qcn_compile.runtime.speculation.options import MTP, SpeculationOptions
from qcn_compile.runtime.speculation.speculation import Speculation
from qcn_compile.runtime.tokenizer import FOLDER, GenerationDefaults, Tokenizer
from qcn_compile.runtime.weights import Report

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]


def load(build: str | PathLike[str], *, context_length: int | None = None, max_running_requests: int = 4,
         threads: int | None = None, cache_memory: int | None = None, memory_share: float | None = None,
         prefill_chunk: int | None = None, huge_pages: bool = False, pin: bool = False, verify: bool = False,
         model: str | PathLike[str] | None = None, prefix: PrefixOptions | None = None,
         speculation: SpeculationOptions | None = None, overrides: str = "{}",
         embedding_on_host: bool = False, report: Report | None = None) -> Model:
    """Open a build. `cache_memory` in bytes bounds KV pages and state slots, `memory_share` these and the weights.

    `huge_pages` copies the weights into huge pages, `pin` binds threads to cores, `verify` hashes every file, `model`
    is the checkpoint that a build without weights takes them from, `prefix` switches the prefix cache on, `speculation`
    drafting. `overrides`: JSON over the rope parameters; `context_length` may then be as long as they allow.
    `embedding_on_host` keeps a GPU build's table of tokens in pinned host memory.
    Raises ArtifactError, CapacityError, UsageError or DeviceError with the cure in the message.
    """
    for name, value in (("threads", threads), ("prefill-chunk", prefill_chunk)):
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: must be at least 1")
    started, path = time.perf_counter(), Path(build)
    manifest = runnable(path, read_manifest(path, deep=verify))
    rope = rope_override(overrides, manifest.model.get("config", {}))
    if rope is not None:
        context_length = context_length or manifest.context_length
        manifest = replace(manifest, context_length=max(rope.positions, manifest.context_length))
        prefix = None if prefix is None else replace(prefix, overrides=overrides)
    device: CpuDevice | CudaDevice
    executable: Executable | CudaExecutable
    if manifest.target.get("kind") == "gpu":
        device, executable, memory = open_gpus(path, manifest, context_length, max_running_requests, cache_memory,
                                               model, report, prefix, bool(speculation), memory_share,
                                               embedding_on_host)
    else:
        if embedding_on_host:
            raise UsageError("--embedding-on-host: a CPU build's weights lie in host memory anyway; leave it out")
        if memory_share is not None:
            cache_memory = shared_budget(memory_share, memory_bytes(), weight_file_bytes(path, manifest))
        memory = plan_memory(manifest, context_length, max_running_requests, cache_memory, prefix, bool(speculation))
        device, executable = open_cpu(path, manifest, memory, threads, pin, huge_pages, report)
    try:
        if rope is not None:
            apply(rope, manifest, executable)
        loaded = Model(path, manifest, device, executable, memory, prefill_chunk, prefix, speculation)
    except (QcnError, OSError):
        close(device, executable)
        raise
    loaded.load_seconds = time.perf_counter() - started
    return loaded


class Model:
    """A loaded artifact. Not thread-safe; close it, or use it as a context manager."""

    def __init__(self, build: Path, manifest: Manifest, device: CpuDevice | CudaDevice,
                 executable: Executable | CudaExecutable, memory: MemoryPlan, prefill_chunk: int | None,
                 prefix: PrefixOptions | None = None, speculation: SpeculationOptions | None = None) -> None:
        self.manifest, self.memory, self.executable = manifest, memory, executable
        self.load_seconds = 0.0
        self._build, self._device = build, device
        self._tokenizer = Tokenizer(build) if (build / FOLDER / "tokenizer.json").is_file() else None
        self.defaults = GenerationDefaults(frozenset(), {}) if self._tokenizer is None else self._tokenizer.defaults
        config = EngineConfig(manifest.vocab_size, memory.page_size, memory.context_length, memory.pages, memory.slots,
                              self.defaults.eos_token_ids, prefill_chunk)
        self.engine = Engine(executable, _no_text if self._tokenizer is None else self._tokenizer.token_bytes, config,
                             prefix_cache(build, prefix, memory, executable.rows, self._tokenizer),
                             _speculation(speculation, memory, executable))
        self._sequences = RaggedSequences(executable, self.engine)
        self._streams: WeakValueDictionary[str, Stream] = WeakValueDictionary()
        self.closed = False

    @property
    def tokenizer(self) -> Tokenizer:
        """The build's tokenizer. Raises ArtifactError when it has none."""
        if self._tokenizer is None:
            raise ArtifactError(f"{self._build} has no tokenizer: give token ids, "
                                "or build again from a checkpoint with tokenizer.json")
        return self._tokenizer

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Logits after every token of one sequence that starts from nothing, f32 [T, vocab].

        Runs in chunks when the largest plan is smaller than T. Raises UsageError for tokens outside the vocabulary,
        CapacityError for more tokens than the context or when running requests hold all slots or pages.
        """
        tokens = check_tokens(token_ids, self.manifest.vocab_size)
        chunk = max(min(c.tokens, c.rows) for c in self.executable.capacities)
        rows = []
        try:
            for start in range(0, len(tokens), chunk):
                rows += self._sequences.step([(self, tokens[start:start + chunk])])
        finally:
            self._sequences.release(self)
        return np.concatenate(rows)

    def step(self, batch: Sequence[tuple[str, Sequence[int]]]) -> list[np.ndarray]:
        """One ragged step: (sequence name, next tokens) -> logits of every token, f32 [tokens, vocab] each.

        A name seen first starts a sequence, which keeps its caches until `release`. Raises CapacityError when no plan
        holds the step, or pages, slots or context run out; the sequences are then as they were.
        """
        return self._sequences.step([(name, check_tokens(ids, self.manifest.vocab_size)) for name, ids in batch])

    def release(self, name: str) -> None:
        """Forget a sequence of `step`."""
        self._sequences.release(name)

    def sampling(self, **overrides: Any) -> SamplingParams:
        """The model's sampling defaults with some fields replaced; None keeps the default.

        Raises UsageError for an unknown field or a value out of its range.
        """
        given = {name: value for name, value in overrides.items() if value is not None}
        unknown = sorted(set(given) - set(SamplingParams.__dataclass_fields__))
        if unknown:
            raise UsageError(f"unknown sampling parameter {', '.join(unknown)}; "
                             f"known: {', '.join(SamplingParams.__dataclass_fields__)}")
        return SamplingParams(**{**self.defaults.sampling, **given})

    def generate(self, prompt: Prompt, params: SamplingParams | None = None, **overrides: Any) -> Stream:
        """Start a request and return its stream of outputs (text, token_ids, finish_reason).

        prompt: text, token ids, or chat messages for the build's template. Sampling fields (see SamplingParams) come
        from `params` or else the model's generation_config, then `overrides`. Streams may be read in turns; closing one
        early frees its caches. Raises UsageError or CapacityError at once.
        """
        chosen = self.sampling(**overrides) if params is None else replace(params, **overrides)
        name = self.engine.add_request(self.encode(prompt), chosen)
        stream = self._streams[name] = Stream(self, name)
        return stream

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt of any kind."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        if prompt and isinstance(prompt[0], Mapping):
            return self.tokenizer.encode(self.tokenizer.chat.render(prompt))  # type: ignore[arg-type]
        return list(prompt)  # type: ignore[arg-type]

    def count_experts(self, file: str | PathLike[str] | None = None) -> Routing:
        """Count from now on which experts the tokens take; with `file`, written there as JSON when the model closes.

        Raises UsageError for GPU builds, and for builds without routers.
        """
        if not isinstance(self.executable, Executable):
            raise UsageError("--expert-statistics: only CPU builds count; build for cpu and run the same text")
        check(self.executable.routes, self._build)
        routing = Routing(str(self.manifest.model["name"]), None if file is None else Path(file))
        routing.write()  # a name that cannot be written is told now, not after a day
        self.executable.routing = routing
        return routing

    def describe(self) -> str:
        """What is loaded and what it costs, in one line."""
        return (f"{len(self.executable.capacities)} plans, {self._device}, "
                f"weights {self.executable.weight_bytes / 1e6:.1f} MB{self._host_weights()}, workspace "
                f"{self.executable.workspace_bytes / 1e6:.1f} MB, context {self.memory.context_length}, {self.memory}, "
                f"loaded in {1e3 * self.load_seconds:.0f} ms")

    def _host_weights(self) -> str:
        size = getattr(self.executable, "host_weight_bytes", 0)
        return f" and {size / 1e6:.1f} MB in host memory" if size else ""

    def check_integrity(self) -> None:
        """Caches, scheduler and inputs are consistent, nothing leaked."""
        self.engine.check_integrity(self._sequences.held())
        self.executable.check_integrity()

    def close(self) -> None:
        """End all requests and stop the threads, whatever fails on the way: keeping the prefixes of the last requests
        needs all ranks, and one may be gone. The model cannot run afterwards."""
        self.closed = True
        with ExitStack() as last:
            if self.executable.routing is not None:
                last.callback(self.executable.routing.write)
            last.callback(close, self._device, self.executable)
            if self.engine.prefixes is not None:
                last.callback(self.engine.prefixes.close)
            self.engine.abort_all()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def pump(self) -> None:
        """Run one engine step and hand its outputs to their streams."""
        for output in self.engine.step():
            if stream := self._streams.get(output.request_id):
                stream.pending.append(output)


class Stream(Iterator[Output]):
    """The outputs of one request, computed as they are asked for, along with those of all other requests."""

    def __init__(self, model: Model, request_id: str) -> None:
        self.request_id = request_id
        self.pending: deque[Output] = deque()
        self._model = model
        self._ended = False

    def __next__(self) -> Output:
        if self._ended:
            raise StopIteration
        while not self.pending:
            if not self._model.engine.runs(self.request_id):
                self._ended = True
                raise UsageError(f"{self.request_id} was ended before its stream was read; keep the model open")
            self._model.pump()
        output = self.pending.popleft()
        self._ended = output.finish_reason is not None
        return output

    def text(self) -> str:
        """Read to the end; the rest of the text in one piece."""
        return "".join(output.text for output in self)

    def close(self) -> None:
        """Abort the request if it still runs."""
        self._ended = True
        if not self._model.closed:
            self._model.engine.abort(self.request_id)

    def __del__(self) -> None:
        self.close()


def _speculation(options: SpeculationOptions | None, memory: MemoryPlan,
                 executable: Executable | CudaExecutable) -> Speculation | None:
    if options is None:
        return None
    if options.algorithm == MTP and not executable.draft_capacities:
        raise UsageError("--speculative-algorithm mtp: this build has no MTP head. If its checkpoint has one "
                         "(Qwen3-Next-80B-A3B has, Qwen3-Coder-Next ships none), build again with qcn-compile --mtp; "
                         "otherwise use --speculative-algorithm ngram")
    drafter = MtpDrafter(executable) if options.algorithm == MTP else LookupDrafter()
    return Speculation(memory.slots, options.count, drafter)


def _no_text(token: int) -> bytes:
    return b""
