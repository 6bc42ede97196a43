"""A plan, carried out: row blocks stream from the base through `ops` to the output.

Peak memory: for each worker one block (BLOCK_ELEMENTS) in float64 and its temporaries, and the factors of the module
at hand. No tensor and no shard is ever held whole. Unadapted tensors are copied by the kernel.
"""

from __future__ import annotations

import errno
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from math import prod
from pathlib import Path
from queue import Empty, SimpleQueue

import torch
from torch import Tensor

from dora_serve.adapter import LazyTensor
from dora_serve.errors import CheckpointError, UnmergeableError
from dora_serve.ops import RoundingBuffers, add_delta, delta_weight, norm_scale, round_once, row_norms
from dora_serve.output import require_space
from dora_serve.plan import LoraEdit, MergePlan, MergeReport, TensorPlan, VectorScale
from dora_serve.progress import OnProgress, Progress, ignore_progress
from dora_serve.quantized.decode import Decoder, open_decoder
from dora_serve.safetensors_file import TensorEntry, encode_header, fill

BLOCK_ELEMENTS = 1 << 19
"""Elements of a row block on a CPU: 4 MB in float64, which stays in the cache and dwarfs the cost of a call."""

CUDA_BLOCK_ELEMENTS = 1 << 22
TASK_ELEMENTS = 1 << 24
"""Rows of one tensor are shared out to workers in tasks of this size."""

COPY_BYTES = 1 << 26
COPY_TASK_BYTES = 1 << 29
"""Large: workers that copy into one file at a time wait for each other."""

MAX_WORKERS = 8
"""Each worker has buffers of its own, and a few of them are faster than a disk."""


@dataclass(frozen=True)
class _Target:
    """An output file, open for positional writes."""

    path: Path
    descriptor: int


@dataclass(frozen=True)
class _Job:
    """One tensor and where it goes."""

    plan: TensorPlan
    target: _Target
    offset: int
    device: torch.device
    buffers: _Buffers
    changed: threading.Event
    advance: Callable[[int], None]


def merge(
    plan: MergePlan,
    folder: Path,
    *,
    metadata: Mapping[str, str] | None = None,
    device: str = "cpu",
    workers: int | None = None,
    on_progress: OnProgress = ignore_progress,
) -> MergeReport:
    """Write the planned weights into `folder`, which exists; the caller makes it and puts it into place.

    Every element is the float64 value of the formula on the stored tensors, rounded once to the output's dtype.
    metadata: for the safetensors headers. workers: threads, one a core by default and MAX_WORKERS at most; torch's own
    threads are set to one while they run, since the blocks are too small to be shared out twice.

    Raises UnmergeableError for a row of zeros that a magnitude would have to scale, or a value that is not finite or
    overflows the output's dtype; CheckpointError for a base that cannot be read; OSError for a disk that is full.
    """
    started = time.monotonic()
    total = plan.nbytes
    require_space(folder, total)
    headers = {name: _header(plan, name, metadata or {}) for name in plan.files}
    targets: dict[str, _Target] = {}
    done = 0
    lock = threading.Lock()

    def advance(nbytes: int) -> None:
        nonlocal done
        with lock:
            done += nbytes
            on_progress(Progress("merging", done, total))

    changed = {tensor.name: threading.Event() for tensor in plan.edited}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, header in headers.items():
            path = folder / name
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            targets[name] = _Target(path, descriptor)
            _write(descriptor, memoryview(header), 0)
            os.ftruncate(descriptor, len(header) + sum(plan.tensors[t].nbytes for t in plan.files[name]))
        tasks = _tasks(plan, targets, headers, torch.device(device), changed, advance)
        _run(tasks, workers or _default_workers(device))
    finally:
        torch.set_num_threads(threads)
        for target in targets.values():
            os.close(target.descriptor)
    unchanged = tuple(
        tensor.name
        for tensor in plan.edited
        if tensor.action not in ("cast", "dequantized") and not changed[tensor.name].is_set()
    )
    return MergeReport(plan, time.monotonic() - started, unchanged)


def _header(plan: MergePlan, file: str, metadata: Mapping[str, str]) -> bytes:
    tensors = {name: (plan.tensors[name].dtype, plan.tensors[name].shape) for name in plan.files[file]}
    base = plan.base.files.get(file)
    data_start = min((entry.start for entry in base.tensors.values()), default=0) if base else 0
    return encode_header(tensors, metadata, data_start)


def _default_workers(device: str) -> int:
    if device != "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_WORKERS, cores)


def _run(tasks: Mapping[_Target, list[Callable[[], None]]], workers: int) -> None:
    """Run all tasks, and flush each file as soon as it is whole, while the next are written.

    As many files as there are workers are written at a time: two workers that write into one wait for each other.
    The first exception stops the rest, and so does Ctrl-C.
    """
    stop = threading.Event()

    def guarded(task: Callable[[], None]) -> None:
        if not stop.is_set():
            task()

    with ThreadPoolExecutor(workers, "merge") as pool, ThreadPoolExecutor(1, "flush") as flusher:
        try:
            written: dict[_Target, list[Future[None]]] = {target: [] for target in tasks}
            for target, task in _in_turns(tasks, workers):
                written[target].append(pool.submit(guarded, task))
            flushed = []
            for target, futures in written.items():
                for future in futures:
                    future.result()
                flushed.append(flusher.submit(os.fsync, target.descriptor))
            for done in flushed:
                done.result()
        except BaseException:
            stop.set()
            raise


def _in_turns(
    tasks: Mapping[_Target, Sequence[Callable[[], None]]], width: int
) -> Iterator[tuple[_Target, Callable[[], None]]]:
    """All tasks, from `width` files in turns, a new file taking the place of one that has no more."""
    waiting = iter(tasks.items())
    open_files = deque((target, iter(group)) for target, group in islice(waiting, width))
    while open_files:
        target, group = open_files.popleft()
        task = next(group, None)
        if task is not None:
            yield target, task
            open_files.append((target, group))
        elif (following := next(waiting, None)) is not None:
            open_files.append((following[0], iter(following[1])))


def _tasks(
    plan: MergePlan,
    targets: Mapping[str, _Target],
    headers: Mapping[str, bytes],
    device: torch.device,
    changed: Mapping[str, threading.Event],
    advance: Callable[[int], None],
) -> dict[_Target, list[Callable[[], None]]]:
    """Independent pieces of work, by file and in the order of the files."""
    buffers = _Buffers(device)
    tasks: dict[_Target, list[Callable[[], None]]] = {}
    for file, names in plan.files.items():
        target, offset = targets[file], len(headers[file])
        tasks[target] = []
        run: list[tuple[TensorEntry, int]] = []
        for name in names:
            tensor = plan.tensors[name]
            if tensor.is_copy:
                assert isinstance(tensor.source, TensorEntry)
                run.append((tensor.source, offset))
            else:
                job = _Job(tensor, target, offset, device, buffers, changed[name], advance)
                tasks[target].extend(_tensor_tasks(job))
            offset += tensor.nbytes
        tasks[target].extend(_copy_tasks(run, target, advance))
    return tasks


def _copy_tasks(
    run: list[tuple[TensorEntry, int]], target: _Target, advance: Callable[[int], None]
) -> Iterator[Callable[[], None]]:
    """Tensors that lie side by side in the base and in the output are copied as one piece."""
    pieces: list[tuple[Path, int, int, int]] = []
    for entry, offset in run:
        if pieces:
            path, start, stop, at = pieces[-1]
            if path == entry.path and stop == entry.start and at + stop - start == offset:
                pieces[-1] = (path, start, entry.stop, at)
                continue
        pieces.append((entry.path, entry.start, entry.stop, offset))
    for path, start, stop, at in pieces:
        # Cut at round offsets, so that no piece ends within a page.
        cuts = range((start // COPY_TASK_BYTES + 1) * COPY_TASK_BYTES, stop, COPY_TASK_BYTES)
        for first, last in pairwise((start, *cuts, stop)):
            where = at + first - start
            yield lambda path=path, first=first, last=last, where=where: _copy(  # type: ignore[misc]
                path, first, last, target, where, advance
            )


def _copy(path: Path, start: int, stop: int, target: _Target, offset: int, advance: Callable[[int], None]) -> None:
    """Copy bytes inside the kernel, or through a buffer where the two file systems do not let it."""
    source = _open(path)
    try:
        position, to = start, offset
        while position < stop:
            try:
                if not hasattr(os, "copy_file_range"):  # only Linux has it
                    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
                count = os.copy_file_range(source, target.descriptor, min(stop - position, COPY_BYTES), position, to)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF):
                    raise _read_error(path, error) if error.errno == errno.EIO else error from error
                buffer = bytearray(min(1 << 22, stop - position))
                fill(source, memoryview(buffer), position, path)
                _write(target.descriptor, memoryview(buffer), to)
                count = len(buffer)
            if count == 0:
                raise CheckpointError(
                    f"{str(path)!r} ended early, at byte {position}.",
                    remedy="It was changed or truncated while it was read.",
                    path=str(path),
                )
            position, to = position + count, to + count
            advance(count)
    finally:
        os.close(source)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise _read_error(path, error) from error


def _read_error(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{str(path)!r} cannot be read: {error.strerror}.",
        remedy="Check that it is there and that you may read it.",
        path=str(path),
    )


def _write(descriptor: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)


def _tensor_tasks(job: _Job) -> Iterator[Callable[[], None]]:
    plan = job.plan
    whole = any(edit.region.transposed or edit.scales_columns for edit in plan.loras)
    if len(plan.shape) < 2 or not plan.loras or whole:
        yield lambda: _merge_tensor(job)
        return
    width = plan.loras[0].region.width
    rows = prod(plan.shape) // width
    step = max(1, TASK_ELEMENTS // width)
    for start in range(0, rows, step):
        yield lambda start=start: _merge_rows(job, start, min(start + step, rows), width)  # type: ignore[misc]


def _merge_tensor(job: _Job) -> None:
    """A whole tensor by one worker: what is small, one-dimensional, stored as (in, out), or scaled by column."""
    plan = job.plan
    width = plan.loras[0].region.width if plan.loras else (plan.shape[-1] if len(plan.shape) > 1 else prod(plan.shape))
    rows = prod(plan.shape) // width if width else 0
    _merge_rows(job, 0, rows, width)


@dataclass(frozen=True)
class _Update:
    """An edit with its factors loaded: A (r, in) and B (out, r) in float64.

    columns: what each column of the region as it is stored is multiplied by, (width,), where it is columns.
    """

    edit: LoraEdit
    lora_a: Tensor
    lora_b: Tensor
    magnitude: Tensor | None
    columns: Tensor | None = None

    def direction(self, weight: Tensor, start: int, *, out: Tensor | None = None) -> Tensor:
        """`V` of stored rows from `start` of the tensor on: weight (rows, width), and so is the result."""
        first = start - self.edit.region.start
        rows = slice(first, first + len(weight))
        if not self.edit.region.transposed:
            return add_delta(weight, self.lora_a, self.lora_b[rows], self.edit.scaling, out=out)
        total = weight + delta_weight(self.lora_a[:, rows], self.lora_b, self.edit.scaling).T
        return total if out is None else out.copy_(total)


def _merge_rows(job: _Job, first: int, last: int, width: int) -> None:
    """Rows [first, last) of the tensor, seen as a matrix of `width` columns."""
    plan = job.plan
    elements = BLOCK_ELEMENTS if job.device.type == "cpu" else CUDA_BLOCK_ELEMENTS
    step = max(1, elements // max(1, width))
    with ExitStack() as stack:
        source = stack.enter_context(_Source(plan.source))
        replaced = [(edit.indices, edit.rows.load()) for edit in plan.rows]
        updates = [
            _load(job, edit, source, replaced)
            for edit in plan.loras
            if edit.region.start < last and edit.region.stop > first
        ]
        vectors = [(edit, edit.vector.load().to(job.device, torch.float64)) for edit in plan.vectors]
        scales = [(scale.start, _output_factor(job, scale)) for scale in plan.scales]
        bounded = _is_bounded(plan, updates)
        edited = bool(replaced or updates or vectors or scales)
        block = stack.enter_context(job.buffers.block(min(step, last - first), width, plan.source.dtype, plan.dtype))
        for start in range(first, last, step):
            stop = min(start + step, last)
            if stop - start < len(block.exact):
                block = block.head(stop - start)
            stored = source.rows(start, stop, width, block.stored)
            if edited or stored.dtype == torch.float64:
                exact = block.exact.copy_(stored)
                _replace_rows(exact, start, replaced)
                for update in updates:
                    _apply(job, update, exact, start, stop)
                for edit, vector in vectors:
                    exact.view(-1)[edit.start : edit.start + vector.shape[0]] += vector * edit.scaling
                for first_output, factor in scales:
                    exact.view(-1)[first_output : first_output + len(factor)] *= factor
                merged = block.output(round_once(exact, plan.dtype, block.rounding))
            else:  # codes, or a cast: torch rounds once from every dtype but float64, so that none is needed between
                exact, merged = stored, _Buffer.of(stored.to(plan.dtype))
            if not bounded:
                _require_finite(job, exact, merged.tensor)
            if not (job.changed.is_set() or _same(merged.tensor, stored)):
                job.changed.set()
            _write(job.target.descriptor, merged.view, job.offset + start * width * plan.dtype.itemsize)
            job.advance(len(merged.view))


def _same(merged: Tensor, stored: Tensor) -> bool:
    return merged.dtype == stored.dtype and torch.equal(merged, stored)


@dataclass(frozen=True)
class _Buffer:
    """A contiguous tensor on the CPU, and its bytes."""

    tensor: Tensor
    view: memoryview

    @staticmethod
    def of(tensor: Tensor) -> _Buffer:
        view = memoryview(tensor.view(torch.uint8).flatten().numpy().data) if tensor.numel() else memoryview(b"")
        return _Buffer(tensor, view)


@dataclass(frozen=True)
class _Block:
    """The buffers of one row block, (rows, width) each, made once for all blocks of a task: calls are dear.

    stored: what is read. rounded: what is written, None where it is computed on another device.
    """

    stored: _Buffer
    exact: Tensor
    rounding: RoundingBuffers
    rounded: _Buffer | None

    @staticmethod
    def of(stored: Tensor, exact: Tensor, rounding: RoundingBuffers) -> _Block:
        rounded = _Buffer.of(rounding.rounded) if rounding.rounded.device.type == "cpu" else None
        return _Block(_Buffer.of(stored), exact, rounding, rounded)

    def head(self, rows: int) -> _Block:
        whole = self.rounding
        rounding = RoundingBuffers(whole.single[:rows], whole.marks[:rows], whole.rounded[:rows])
        return _Block.of(self.stored.tensor[:rows], self.exact[:rows], rounding)

    def output(self, merged: Tensor) -> _Buffer:
        """`merged`, which is in the buffer for it, on the CPU."""
        return self.rounded or _Buffer.of(merged.cpu())


class _Buffers:
    """Memory for row blocks, used again and again: fresh pages for every block would cost more than the arithmetic."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: SimpleQueue[dict[str, Tensor]] = SimpleQueue()

    @contextmanager
    def block(self, rows: int, width: int, stored: torch.dtype, dtype: torch.dtype) -> Iterator[_Block]:
        try:
            flat = self._free.get_nowait()
        except Empty:
            flat = {}

        def view(name: str, kind: torch.dtype, device: torch.device) -> Tensor:
            nbytes = rows * width * kind.itemsize
            have = flat.get(name)
            if have is None or have.numel() < nbytes:
                flat[name] = have = torch.empty(nbytes, dtype=torch.uint8, device=device)
            return have[:nbytes].view(kind).view(rows, width)

        rounding = RoundingBuffers(
            view("single", torch.float32, self._device),
            view("marks", torch.int32, self._device),
            view("rounded", dtype, self._device),
        )
        exact = view("exact", torch.float64, self._device)
        try:
            yield _Block.of(view("stored", stored, torch.device("cpu")), exact, rounding)
        finally:
            self._free.put(flat)


_Rows = Sequence[tuple[tuple[int, ...], Tensor]]
"""Indices into the stored tensor, and the rows that take their places."""


def _replace_rows(block: Tensor, start: int, replaced: _Rows) -> None:
    """Put replaced rows into the block of stored rows that begins with row `start`, in place."""
    for indices, rows in replaced:
        for position, index in enumerate(indices):
            if start <= index < start + len(block):
                block[index - start] = rows[position].to(block)


def _load(job: _Job, edit: LoraEdit, source: _Source, replaced: _Rows) -> _Update:
    lora_a = edit.lora_A.load().to(job.device, torch.float64)
    lora_b = edit.lora_B.load().to(job.device, torch.float64)
    magnitude = edit.magnitude.load().to(job.device, torch.float64) if edit.magnitude else None
    update = _Update(edit, lora_a, lora_b, magnitude)
    if magnitude is None or not edit.scales_columns:
        return update
    columns = magnitude
    if edit.norm.axis is not None:
        # The norm of a column runs over all blocks: read once to sum, once to write.
        squares = torch.zeros(edit.region.width, dtype=torch.float64, device=job.device)
        for direction in _directions(update, source, replaced):
            squares += direction.square_().sum(dim=0)
        # Of a convolution, the columns of one input channel are its kernel, which shares one norm.
        norms = squares.view(len(magnitude), -1).sum(dim=1).sqrt_()
        columns = _checked_scale(job.plan.name, edit, magnitude, norms)
    return replace(update, columns=columns.repeat_interleave(edit.region.width // len(columns)))


def _directions(update: _Update, source: _Source, replaced: _Rows) -> Iterator[Tensor]:
    """`V` of the whole region, in blocks of its stored rows."""
    region = update.edit.region
    step = max(1, BLOCK_ELEMENTS // region.width)
    for start in range(region.start, region.stop, step):
        stop = min(start + step, region.stop)
        weight = source.rows(start, stop, region.width).to(update.lora_a)
        _replace_rows(weight, start, replaced)
        yield update.direction(weight, start)


def _output_factor(job: _Job, scale: VectorScale) -> Tensor:
    """`m / ||V||` (out,) of the edit of another tensor, in one pass over that."""
    edit, weight = scale.edit, scale.weight
    assert edit.magnitude is not None
    assert edit.norm.axis == "out"
    with _Source(weight.source) as source:
        replaced = [(rows.indices, rows.rows.load()) for rows in weight.rows]
        update = _load(job, edit, source, replaced)
        if update.columns is not None:
            return update.columns
        norms = torch.cat([row_norms(direction) for direction in _directions(update, source, replaced)])
        assert update.magnitude is not None
        return _checked_scale(weight.name, edit, update.magnitude, norms)


def _apply(job: _Job, update: _Update, exact: Tensor, start: int, stop: int) -> None:
    """Add an update in place to the block of rows [start, stop) of a stored tensor."""
    region = update.edit.region
    low, high = max(start, region.start), min(stop, region.stop)
    if low >= high:
        return
    block = exact if (low, high) == (start, stop) else exact[low - start : high - start]
    update.direction(block, low, out=block)
    if update.columns is not None:
        block.mul_(update.columns)
    elif update.magnitude is not None:
        scale = update.magnitude[low - region.start : high - region.start]
        if update.edit.norm.axis is not None:
            scale = _checked_scale(job.plan.name, update.edit, scale, row_norms(block))
        block.mul_(scale.unsqueeze(1))


def _checked_scale(tensor: str, edit: LoraEdit, magnitude: Tensor, norms: Tensor) -> Tensor:
    norms = norms + edit.norm.eps if edit.norm.eps else norms
    scale = norm_scale(magnitude, norms)
    # The sum of the magnitudes, unless something is NaN or infinite: it stays so in a sum of products.
    if not math.isfinite(torch.dot(scale, norms).item()):
        raise _zero_row(tensor, edit.module)
    return scale


def _is_bounded(plan: TensorPlan, updates: list[_Update]) -> bool:
    """Whether no element can leave the output's dtype: none of a DoRA row exceeds its magnitude, once the scale of the
    row is known to be finite."""
    covered = sum(edit.region.stop - edit.region.start for edit in plan.loras) * (
        plan.loras[0].region.width if plan.loras else 0
    )
    normed = [update.magnitude for update in updates if update.edit.norm.axis is not None]
    largest = [float(magnitude.abs().max()) for magnitude in normed if magnitude is not None]
    limit = torch.finfo(plan.dtype).max if plan.dtype.is_floating_point else 0
    return covered == prod(plan.shape) and len(largest) == len(updates) > 0 and max(largest) < limit / 2


def _require_finite(job: _Job, exact: Tensor, merged: Tensor) -> None:
    """NaN and infinity survive a sum, and no sum of finite 16- or 32-bit floats leaves float64."""
    if not merged.dtype.is_floating_point or bool(torch.isfinite(merged.sum(dtype=torch.float64))):
        return
    modules = ", ".join(edit.module for edit in job.plan.loras[:3])
    if any(edit.magnitude is not None for edit in job.plan.loras):
        raise _zero_row(job.plan.name, modules)
    wrong = ~torch.isfinite(merged)
    if not modules:  # what was not finite in the base may stay so in a tensor that is only cast or replaced
        wrong &= torch.isfinite(exact).cpu()
    if bool(wrong.any()):
        raise UnmergeableError(
            f"{job.plan.name} would hold {int(wrong.sum())} values that are NaN or infinite "
            f"(updated by {modules or 'the cast alone'}).",
            remedy="The base holds NaN or infinities there, or the result overflows the dtype: try --dtype bfloat16 "
            "or float32.",
            tensor=job.plan.name,
        )


def _zero_row(tensor: str, module: str) -> UnmergeableError:
    return UnmergeableError(
        f"{module}: a row of W + s B A in {tensor} is zero or not finite, or the result overflows the dtype, so its "
        "magnitude has no direction to scale.",
        remedy="The unmerged model gives NaN there as well: use another checkpoint of the adapter, or --dtype float32 "
        "if the base is float16.",
        tensor=tensor,
    )


class _Source:
    """Rows of a stored tensor by range, or of one that the adapter brings."""

    def __init__(self, source: TensorEntry | LazyTensor) -> None:
        self._source = source
        self._descriptor: int | None = None
        self._whole: Tensor | None = None
        self._decode: Decoder | None = None

    def __enter__(self) -> _Source:
        if isinstance(self._source, TensorEntry) and self._source.coding is not None:
            self._decode = open_decoder(self._source)
        elif isinstance(self._source, TensorEntry):
            self._descriptor = _open(self._source.path)
        else:
            self._whole = self._source.load()
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)

    def rows(self, start: int, stop: int, width: int, into: _Buffer | None = None) -> Tensor:
        """(stop - start, width), in the stored dtype; `into` is where it is read to."""
        if self._whole is not None:
            return self._whole.reshape(-1, width)[start:stop]
        if self._decode is not None:
            return self._decode(start * width, stop * width).view(-1, width)
        assert isinstance(self._source, TensorEntry)
        assert self._descriptor is not None
        buffer = into or _Buffer.of(torch.empty((stop - start, width), dtype=self._source.dtype))
        offset = self._source.start + start * width * self._source.dtype.itemsize
        fill(self._descriptor, buffer.view, offset, self._source.path)
        return buffer.tensor
