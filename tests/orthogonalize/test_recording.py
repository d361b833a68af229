"""Recorded launches do what the calls that they were made from do; with launches on CPU memory."""

import ctypes
import threading

import numpy as np
import pytest
import torch

from flashns_dist.orthogonalize import orthogonalize
from flashns_dist.orthogonalize.kernels import recording
from flashns_dist.orthogonalize.kernels.recording import Recordings, active_recorder

SIZE = 24


def memory(address, size=SIZE):
    """The floats at an address."""
    return np.ctypeslib.as_array((ctypes.c_float * size).from_address(address))


def multiply(values):
    """Stands for a kernel: ``target = factor * (source + other)``."""
    source, other, factor, target = values
    memory(target)[:] = np.float32(factor) * (memory(source) + memory(other))


def launch(*arguments, kernel=multiply):
    """What ``LaunchTable.launch`` does with a launch that it has prepared."""
    values = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
    recorder = active_recorder()
    if recorder is not None:
        recorder.note(kernel, values)
    kernel(values)


class Call:
    """A function of a tensor that counts its calls."""

    def __init__(self, body):
        self.body, self.calls = body, 0

    def __call__(self, x):
        self.calls += 1
        return self.body(x)


def chain(x):
    """``28 x``, in memory that is freed and handed out again."""
    first = torch.empty_like(x)
    launch(x, x, 1.0, first)
    second = x.new_empty(x.shape)
    launch(first, first[:], 1.5, second)
    del first
    third = torch.empty(x.shape)
    launch(second, x, 4.0, third)
    return third


def numbers(seed=0):
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))


def new_recordings(**options):
    return Recordings(lambda: False, **options)


def test_the_third_call_and_later_ones_repeat_the_second():
    recordings, call = new_recordings(), Call(chain)
    results = []
    for seed in range(5):
        x = numbers(seed)
        results.append(recordings.call("chain", call, x))
        assert torch.equal(results[-1], 4.0 * (1.5 * (2 * x + 2 * x) + x)), seed
    assert (call.calls, len(recordings)) == (2, 1)
    assert len({result.data_ptr() for result in results}) == 5


def test_memory_is_taken_before_its_first_use_and_given_back_after_its_last():
    recordings = new_recordings()
    for seed in range(2):
        recordings.call("chain", chain, numbers(seed))
    (found,) = recordings._known.values()
    taken = [{buffer for buffer, _ in step.allocated} for step in found._steps]
    given = [set(step.released) for step in found._steps]
    assert [len(t) for t in taken] == [1, 1, 1]
    assert given == [set(), taken[0], taken[1]]  # and the result is returned
    assert all(size == 4 * SIZE for step in found._steps for _, size in step.allocated)


def operations(x):
    """Launches, and operations that return new memory, write into some, or read constants."""
    first = torch.empty_like(x)
    launch(x, x, 1.0, first)
    second = first.view(4, -1).T * 2.0  # not contiguous
    first.copy_(second.reshape(-1)[: first.numel()])
    del second
    third = torch.empty(3, SIZE)
    torch.add(first, CONSTANT, alpha=3.0, out=third[1])
    third[0], third[2] = x, 0.5
    fourth = torch.empty_like(x)
    launch(third[1], third[0], 1.5, fourth)
    return torch.stack([fourth, third.sum(0)]).T


CONSTANT = torch.arange(float(SIZE))


def test_operations_of_torch_are_repeated():
    recordings, call = new_recordings(), Call(operations)
    for seed in range(5):
        x = numbers(seed)
        result = recordings.call(0, call, x)
        assert torch.equal(result, operations(x)), seed
        assert result.stride() == operations(x).stride()
        assert torch.equal(x, numbers(seed))
    assert (call.calls, len(recordings)) == (2, 1)


@pytest.mark.parametrize("method", ["standard", "gram", "unbiased", "fast", "aol"])
@pytest.mark.parametrize("shape", [(3, 96, 160), (1, 300, 300), (2, 160, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_method_can_be_repeated(method, shape, dtype):
    recordings = new_recordings()
    call = Call(lambda x: orthogonalize(x, method=method, backend="torch"))
    for seed in range(4):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        expected = orthogonalize(x, method=method, backend="torch")
        assert torch.equal(recordings.call(0, call, x), expected), seed
    assert call.calls == 2


@pytest.mark.parametrize(
    "unsettled",
    [
        lambda t: t.sum().item(),
        torch.rand_like,
        torch.nonzero,
        lambda t: torch.empty(1, device="meta"),
    ],
)
def test_what_the_input_steers_is_not_recorded(unsettled):
    def body(x):
        out = torch.empty_like(x)
        launch(x, x, 1.0, out)
        unsettled(out)
        return out

    recordings, call = new_recordings(), Call(body)
    for seed in range(6):
        assert torch.equal(recordings.call(0, call, numbers(seed)), 2 * numbers(seed))
    assert (call.calls, len(recordings)) == (6, 0)


def test_questions_about_dtypes_do_not_prevent_a_recording():
    def body(x):
        out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, torch.float16))
        launch(x, x, 1.0, out)
        return out

    recordings, call = new_recordings(), Call(body)
    for seed in range(4):
        assert torch.equal(recordings.call(0, call, numbers(seed)), 2 * numbers(seed))
    assert call.calls == 2


def test_views_are_recorded_and_what_they_are_views_of_is_kept():
    constant = torch.arange(2.0 * SIZE)

    def body(x):
        out = torch.empty(2 * SIZE)
        launch(x, constant.view(2, SIZE)[1], 1.0, out.view(2, SIZE)[0])
        launch(x, x, 1.0, out[SIZE:])
        return out

    recordings, call = new_recordings(), Call(body)
    for seed in range(4):
        x = numbers(seed)
        expected = torch.cat([x + torch.arange(SIZE, 2.0 * SIZE), 2 * x])
        assert torch.equal(recordings.call(0, call, x), expected)
    assert call.calls == 2


def test_memory_from_elsewhere_is_not_recorded():
    hidden = [numbers(7) for _ in range(6)]

    def body(x):
        out = torch.empty_like(x)
        launch(x, hidden[call.calls - 1], 1.0, out)
        return out

    recordings, call = new_recordings(), Call(body)
    for _ in range(6):
        recordings.call(0, call, numbers())
    assert call.calls == 6


def test_a_recording_that_misses_a_launch_is_refused():
    def body(x):
        first, out = torch.empty_like(x), torch.empty_like(x)
        multiply([x.data_ptr(), x.data_ptr(), 1.0, first.data_ptr()])  # that nobody heard of
        launch(first, x, 1.0, out)
        return out

    recordings, call = new_recordings(), Call(body)
    recordings.call(0, call, numbers(0))
    with pytest.warns(UserWarning, match="another result"):
        result = recordings.call(0, call, numbers(1))
    assert torch.equal(result, 3 * numbers(1))
    for seed in range(3):
        assert torch.equal(recordings.call(0, call, numbers(seed)), 3 * numbers(seed))
    assert call.calls == 6


def test_a_call_whose_result_is_not_finite_is_not_recorded():
    recordings, call = new_recordings(), Call(chain)
    spoilt = numbers(0)
    spoilt[3] = torch.nan
    for seed in range(5):
        x = spoilt if seed == 1 else numbers(seed)
        result = recordings.call(0, call, x)
        assert torch.equal(result.nan_to_num(7.0), chain(x).nan_to_num(7.0))
        assert len(recordings) == (seed > 1)
    assert call.calls == 3
    for _ in range(6):
        recordings.call(1, call, spoilt)
    for seed in range(3):  # after as many attempts as there are
        recordings.call(1, call, numbers(seed))
    assert (call.calls, len(recordings)) == (12, 1)


def test_memory_beside_the_input_is_not_taken_for_a_part_of_it():
    block = torch.cat([numbers(0), numbers(1), numbers(2)])
    constant = block[SIZE : 2 * SIZE]

    def body(x):
        out = torch.empty_like(x)
        launch(x, constant.view(-1), 1.0, out)
        return out

    recordings = new_recordings()
    for _ in range(2):
        recordings.call(0, body, block[:SIZE])
    result = recordings.call(0, body, block[2 * SIZE :])
    assert torch.equal(result, numbers(2) + numbers(1))


def test_a_result_that_is_a_part_of_what_was_written_is_not_recorded():
    def body(x):
        out = torch.empty(2 * SIZE)
        launch(x, x, 1.0, out)
        launch(x, x, 1.0, out[SIZE:])
        return out[:SIZE]

    recordings, call = new_recordings(), Call(body)
    for seed in range(8):
        assert torch.equal(recordings.call(0, call, numbers(seed)), 2 * numbers(seed))
    assert (call.calls, len(recordings)) == (8, 0)


def test_settings_that_are_always_new_are_not_recorded_for_ever():
    recordings, call = new_recordings(), Call(chain)
    for key in range(100):
        for _ in range(2):
            recordings.call(key, call, numbers())
    assert len(recordings) == recording.MAX_IDLE
    for key in range(100):  # and now they are used
        for _ in range(2):
            recordings.call(key, call, numbers())
    assert len(recordings) == 100


def test_a_repetition_that_fails_is_tried_a_few_times():
    failing = True

    def fail(values):
        if active_recorder() is None and failing:
            raise MemoryError
        multiply(values)

    def body(x):
        out = torch.empty_like(x)
        if active_recorder() is None:
            multiply([x.data_ptr(), x.data_ptr(), 1.0, out.data_ptr()])
        else:
            launch(x, x, 1.0, out, kernel=fail)
        return out

    recordings, call = new_recordings(), Call(body)
    failures = 0
    for seed in range(10):
        try:
            assert torch.equal(recordings.call(0, call, numbers(seed)), 2 * numbers(seed))
        except MemoryError:
            failures += 1
    assert failures == 3


@pytest.mark.parametrize(("until", "calls"), [(2, 3), (100, 9)])
def test_calls_with_launches_that_are_not_prepared_are_tried_again_a_few_times(until, calls):
    def body(x):
        out = torch.empty_like(x)
        if active_recorder() is not None and call.calls <= until:
            active_recorder().is_incomplete = True
            multiply([x.data_ptr(), x.data_ptr(), 1.0, out.data_ptr()])
        else:
            launch(x, x, 1.0, out)
        return out

    recordings, call = new_recordings(), Call(body)
    for seed in range(9):
        assert torch.equal(recordings.call(0, call, numbers(seed)), 2 * numbers(seed))
    assert call.calls == calls


def test_who_watches_launches_sees_the_calls():
    watching = True
    recordings, call = Recordings(lambda: watching), Call(chain)
    for _ in range(3):
        recordings.call(0, call, numbers())
    assert (call.calls, len(recordings)) == (3, 0)
    watching = False
    for _ in range(3):
        recordings.call(0, call, numbers())
    assert (call.calls, len(recordings)) == (5, 1)
    watching = True
    recordings.call(0, call, numbers())
    assert call.calls == 6


def test_inputs_that_lie_otherwise_have_recordings_of_their_own():
    recordings, call = new_recordings(), Call(chain)
    block = torch.zeros(4 * SIZE)
    start = (-block.data_ptr() % 16) // 4
    inputs = [block[start : start + SIZE], block[start + 1 : start + 1 + SIZE]]
    inputs += [inputs[0].view(2, SIZE // 2)]
    for x in inputs * 3:
        recordings.call(0, call, x)
    assert (call.calls, len(recordings)) == (6, 3)
    recordings.call("other settings", call, inputs[0])
    assert call.calls == 7


def test_the_oldest_recording_is_forgotten():
    recordings, call = new_recordings(limit=2), Call(chain)
    for key in (1, 1, 2, 2, 3, 3, 1):
        recordings.call(key, call, numbers())
    assert (call.calls, len(recordings)) == (7, 1)


def test_a_call_that_fails_leaves_no_recorder_behind():
    recordings = new_recordings()

    def body(x):
        if active_recorder() is not None:
            raise RuntimeError("out of memory")
        return chain(x)

    recordings.call(0, body, numbers())
    with pytest.raises(RuntimeError, match="out of memory"):
        recordings.call(0, body, numbers())
    assert active_recorder() is None
    assert torch.equal(recordings.call(1, chain, numbers()), chain(numbers()))


def test_other_threads_are_not_recorded():
    def body(x):
        results = []
        other = threading.Thread(target=lambda: results.append(chain(x)))
        other.start()
        other.join()
        return chain(x)

    recordings = new_recordings()
    for seed in range(3):
        recordings.call(0, body, numbers(seed))
    (found,) = recordings._known.values()
    assert len(found._steps) == 3


def test_threads_that_record_the_same_call_leave_one_idle_recording():
    recordings = new_recordings()
    recordings.call(0, chain, numbers())
    both = threading.Barrier(2, timeout=60)

    def body(x):
        both.wait()  # so that neither finds the other's recording
        return chain(x)

    threads = [
        threading.Thread(target=recordings.call, args=(0, body, numbers())) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (found,) = recordings._known.values()
    assert recordings._idle == {id(found)}
    (key,) = recordings._known
    recordings._keep(key, 1)  # by a thread that has made the first call
    assert recordings._known[key] is found
    recordings.call(0, body, numbers())
    assert not recordings._idle


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnDevice:
    @pytest.fixture(autouse=True)
    def forget(self):
        recording._recordings.cache_clear()

    @pytest.mark.parametrize(
        ("method", "shape", "dtype"),
        [
            ("fast", (3, 768, 2048), torch.bfloat16),
            ("fast", (2, 1100, 640), torch.bfloat16),  # tall, edges in tiles
            ("fast", (4, 1024, 1024), torch.float16),
            ("fast", (2, 768, 768), torch.float32),
            ("fast", (1, 2048, 6144), torch.bfloat16),
            ("unbiased", (5, 320, 1024), torch.bfloat16),
            ("unbiased", (5, 1024, 320), torch.float32),
            ("standard", (7, 256, 512), torch.bfloat16),
            ("gram", (7, 100, 512), torch.bfloat16),
            ("aol", (3, 300, 512), torch.bfloat16),
        ],
    )
    def test_results_are_those_of_the_first_call(self, method, shape, dtype):
        inputs = [
            torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)
            for seed in range(4)
        ]
        expected = []
        for x in inputs:
            recording._recordings.cache_clear()
            expected.append(orthogonalize(x, method=method))
        recording._recordings.cache_clear()
        kept = [x.clone() for x in inputs]
        for turn in range(3):
            for x, copy, y in zip(inputs, kept, expected, strict=True):
                assert torch.equal(orthogonalize(x, method=method), y), turn
                assert torch.equal(x, copy)
        if _is_familiar():
            assert len(recording._recordings()) == 1

    def test_streams_and_graphs_are_followed(self):
        x = torch.randn(2, 768, 1024, device="cuda").bfloat16()
        expected = orthogonalize(x)
        for _ in range(3):
            assert torch.equal(orthogonalize(x), expected)
        static = torch.zeros_like(x)
        graph = torch.cuda.CUDAGraph()
        orthogonalize(static)
        with torch.cuda.graph(graph):
            out = orthogonalize(static)
        static.copy_(x)
        graph.replay()
        assert torch.equal(out, expected)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(10**8)
            late = x * 1.0  # not there yet when the host goes on
            result = orthogonalize(late)
        side.synchronize()
        assert torch.equal(result, expected)

    def test_less_memory_is_held_than_without(self):
        x = torch.randn(4, 1024, 4096, device="cuda").bfloat16()

        def peak():
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            result = orthogonalize(x)
            found = torch.cuda.max_memory_allocated() - before
            del result
            return found

        peaks = [peak() for _ in range(4)]
        assert max(peaks[1:]) <= peaks[0] + 2**22  # sums of rows


def _is_familiar():
    from flashns_dist.orthogonalize.kernels.triton_prepared import unfamiliar

    return unfamiliar() is None


def test_a_new_scalar_in_memory_that_was_a_buffer_is_a_constant():
    scalar = torch.tensor(0.5)

    def lifted(x):
        first = torch.empty_like(x)
        launch(x, x, 1.0, first)
        # As if the scalar had been made where another buffer was.
        active_recorder()._ranges.append((scalar.data_ptr(), scalar.data_ptr() + 96))
        last = torch.empty_like(x)
        torch.mul(first, torch.ops.aten.lift_fresh(scalar), out=last)
        return last

    x = numbers()
    with recording.Recorder(x) as recorder:
        result = lifted(x)
    found = recorder.finish(result)
    assert found is not None
    assert torch.equal(found(x, spoil=True), x)
