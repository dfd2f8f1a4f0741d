"""A process pools with several threads and forks; its child pools too. Threads do not survive a fork, and a loop over
the pool that they have left behind never ends: where nothing is done about it, these tests see a child that its alarm
has ended. Each program is a process of its own, since what threads this one has had is nobody's to say."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

if not hasattr(os, "fork"):
    pytest.skip("this system does not fork", allow_module_level=True)

LIMIT = 120  # seconds of a program; its children have fewer
PRELUDE = """
import multiprocessing, os, pickle, signal, sys, threading, traceback, warnings
import torch, fastpool
from fastpool.testing import required, function_of

torch.set_num_threads(4)
torch.manual_seed(0)
hidden = torch.randn(32, 256, 64)  # 2 MiB: several threads take their share
mask = torch.rand(32, 256) < 0.9


def pooled():
    # every mode, its gradient, normalisation and its gradient
    results = []
    for mode in fastpool.MODES:
        x = hidden.clone().requires_grad_()
        result = function_of(mode)(x, mask=mask, normalize=True, **required(mode, x.shape))
        result.square().sum().backward()
        results += [result.detach(), x.grad]
    x = hidden.clone().requires_grad_()
    fastpool.l2_normalize(x)[..., 0].sum().backward()
    return results + [fastpool.l2_normalize(hidden), x.grad]


def same(ours, theirs):
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def heard(function):
    # what it gives, and the words of fastpool's warnings
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function()
    return result, [str(warning.message) for warning in caught if "fork" in str(warning.message)]


def child(function):
    # what it gives in a child of this thread; an end, not a wait for ever, where it hangs
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        try:
            answer = pickle.dumps((function(), None))
        except BaseException:
            answer = pickle.dumps((None, traceback.format_exc()))
        with open(write, "wb") as pipe:
            pipe.write(answer)
        os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        answer = pipe.read()
    status = os.waitpid(pid, 0)[1]
    assert status == 0, f"the child hangs: status {status}"
    result, failed = pickle.loads(answer)
    assert failed is None, failed
    return result


def in_thread(function):
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]
"""


def run(program: str, **environment: str) -> str:
    """What a program prints. It and its children are ended where it takes too long."""
    process = subprocess.Popen(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", **environment},
        start_new_session=True,
    )
    try:
        out, errors = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, errors = process.communicate()
        pytest.fail(f"hangs: {out}{errors}")
    assert process.returncode == 0, out + errors
    return out


def test_a_child_has_one_thread_the_same_bits_and_one_warning() -> None:
    run(
        """
        expected = pooled()

        def first():
            (results, again), said = heard(lambda: (pooled(), pooled()))
            assert same(results, expected) and same(again, expected)
            assert torch.get_num_threads() == 1
            by_python, fastpool.dispatch.run = fastpool.dispatch.run, None
            assert torch.equal(fastpool.mean(hidden), plain)  # straight to C++ again, now that it is said
            fastpool.dispatch.run = by_python
            (message,) = said
            for words in (f"process {os.getpid()}:", "4 threads", "one thread", "spawn", "torch.set_num_threads(1)"):
                assert words in message, message
            # Asked for threads, torch's own loops would hang; fastpool's have none.
            torch.set_num_threads(4)
            assert torch.equal(fastpool.mean(hidden), plain)
            return child(second)

        def second():
            results, said = heard(pooled)
            return same(results, expected) and len(said) == 1 and f"process {os.getpid()}:" in said[0]

        plain = fastpool.mean(hidden)
        assert child(first) is True
        # The parent is as it was, and its next child too.
        assert torch.get_num_threads() == 4
        results, said = heard(pooled)
        assert same(results, expected) and said == []
        assert child(first) is True
        """
    )


def test_torch_itself_does_not_hang_before_the_first_call() -> None:
    run(
        """
        fastpool.mean(hidden)
        total = (hidden @ hidden.mT).sum().item()

        def model_then_pooling():
            states = hidden @ hidden.mT
            return heard(lambda: fastpool.mean(states))

        result, said = child(model_then_pooling)
        assert torch.equal(result, fastpool.mean(hidden @ hidden.mT)) and len(said) == 1
        # A worker's own start may ask for threads; the first call puts that right before it uses torch itself.
        def asking_for_threads(*arguments):
            torch.set_num_threads(4)
            return fastpool.mean(*arguments)

        columns = hidden.mT.contiguous().mT  # to be copied
        assert torch.equal(child(lambda: asking_for_threads(columns)), fastpool.mean(columns))
        long, ones = torch.randn(4, 30000, 8), torch.ones(4, 30000, dtype=torch.int64)  # to be looked through
        assert torch.equal(child(lambda: asking_for_threads(long, ones)), fastpool.mean(long, ones))
        # The warning shows the line of the call.
        def where():
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                fastpool.mean(hidden)
            return caught[0].filename, caught[0].category.__name__
        assert child(where) == ("<string>", "RuntimeWarning")
        """
    )


def test_multiprocessing_by_fork() -> None:
    run(
        """
        expected = fastpool.mean(hidden, mask).tolist()

        def work(i):
            signal.alarm(20)  # its pool would start another worker and wait on: the limit of the program ends that
            result, said = heard(lambda: fastpool.mean(hidden, mask).tolist())
            return os.getpid(), result, said

        with multiprocessing.get_context("fork").Pool(2) as pool:
            answers = pool.map_async(work, range(8), chunksize=1).get(timeout=60)
        assert all(result == expected for _, result, _ in answers)
        for worker in {pid for pid, _, _ in answers}:
            assert sum(len(said) for pid, _, said in answers if pid == worker) == 1
        """
    )


def test_a_server_that_preloads() -> None:
    """gunicorn --preload: the arbiter imports the application, which loads its model and here warms it up; then it
    forks its workers with os.fork, each of which serves requests until it is told to go."""
    run(
        """
        requests = [hidden[: 8 * n] for n in (1, 2, 3, 4)]  # of 0.5 MiB and more
        expected = [fastpool.mean(request, normalize=True).tolist() for request in requests]

        def serve(requests_in, answers_out):
            signal.alarm(30)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                while (i := requests_in.recv()) is not None:
                    result = fastpool.mean(requests[i], normalize=True).tolist()
                    answers_out.send((result, len(caught)))
            os._exit(0)

        workers = []
        for _ in range(3):
            requests_in, ask = multiprocessing.Pipe(duplex=False)
            answer, answers_out = multiprocessing.Pipe(duplex=False)
            pid = os.fork()
            if pid == 0:
                serve(requests_in, answers_out)
            answers_out.close()  # so that a worker that has gone is an end of file
            workers.append((pid, ask, answer))
        for i in (0, 1, 2, 3, 2, 1):
            for _, ask, _ in workers:
                ask.send(i)
            fastpool.mean(hidden)  # the arbiter may go on
            for _, _, answer in workers:
                assert answer.recv() == (expected[i], 1)
        for pid, ask, _ in workers:
            ask.send(None)
            assert os.waitpid(pid, 0)[1] == 0
        """
    )


@pytest.mark.wide
def test_what_was_compiled_before_is_compiled_again() -> None:
    """For one thread, and by nobody else: Inductor's processes belong to the parent."""
    run(
        """
        import tempfile
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()
        compiled = torch.compile(lambda x: fastpool.mean(torch.relu(x) * 2 + 1, normalize=True))
        expected = compiled(hidden)

        def again():
            signal.alarm(90)
            return heard(lambda: compiled(hidden))

        result, said = child(again)
        assert torch.equal(result, expected) and len(said) == 1
        """
    )


def test_a_child_from_before_threads_keeps_them() -> None:
    run(
        """
        def free():
            results, said = heard(pooled)
            return results, said, torch.get_num_threads(), len(os.listdir("/proc/self/task"))

        results, said, threads, tasks = child(free)
        assert said == [] and threads == 4 and tasks >= 4
        torch.set_num_threads(1)
        assert same(results, pooled())
        results, said, threads, _ = child(free)  # nor does one thread leave anything behind
        assert said == [] and threads == 1
        torch.set_num_threads(4)
        pooled()
        torch.set_num_threads(1)
        results, said, threads, _ = child(free)  # nothing is lost to who wants no more than one
        assert said == [] and threads == 1
        """
    )


def test_threads_belong_to_the_thread_that_pooled() -> None:
    """OpenMP keeps a pool for each thread that has begun a loop: what another thread has left behind hurts nobody."""
    run(
        """
        expected = in_thread(pooled)
        results, said = child(lambda: heard(pooled))
        assert same(results, expected) and said == []
        fastpool.mean(hidden)
        results, said = in_thread(lambda: child(lambda: heard(pooled)))
        assert same(results, expected) and said == []
        in_thread(lambda: fastpool.mean(hidden))
        pool_and_fork = lambda: (fastpool.mean(hidden), child(lambda: heard(pooled)))[1]
        results, said = in_thread(pool_and_fork)
        assert same(results, expected) and len(said) == 1
        # In a child with one thread, every thread has one.
        results, said = child(lambda: in_thread(lambda: heard(pooled)))
        assert same(results, expected) and len(said) == 1
        """
    )


def test_a_warning_that_is_an_error_hangs_nothing_and_validation_stays_as_it_was() -> None:
    run(
        """
        expected = fastpool.mean(hidden)

        def strict():
            warnings.simplefilter("error")
            try:
                fastpool.mean(hidden)
            except (RuntimeError, RuntimeWarning) as error:
                said = str(error)
            return said, torch.equal(fastpool.mean(hidden), expected)  # once: the next call is served

        said, equal = child(strict)
        assert equal and "4 threads" in said

        hidden[0, 0, 0] = float("nan")

        def not_finite():
            try:
                fastpool.mean(hidden)
            except ValueError as error:
                return str(error)

        def validated():
            fastpool.validate()
            return not_finite(), not_finite()

        assert child(lambda: (not_finite(), not_finite())) == (None, None)
        assert all("hidden[0, 0, 0] is nan" in error for error in child(validated))
        """
    )


def test_a_model_counts_whose_states_were_pooled() -> None:
    """Whatever is pooled comes from a model, and torch has run that with threads, however little there was to pool."""
    run(
        """
        hidden @ hidden.mT
        fastpool.mean(hidden[:1, :8])
        result, said = child(lambda: heard(lambda: fastpool.mean(hidden)))
        assert torch.equal(result, fastpool.mean(hidden)) and len(said) == 1
        """
    )


def test_the_reference_too() -> None:
    run(
        """
        assert fastpool.explain(hidden).backend == "reference"
        expected = fastpool.mean(hidden)
        result, said = child(lambda: heard(lambda: fastpool.mean(hidden)))
        assert torch.equal(result, expected) and len(said) == 1 and "4 threads" in said[0]

        def by_native():
            fastpool.mean(hidden)
            torch.set_num_threads(4)  # which torch itself would hang with
            with fastpool.backend("native"):
                return fastpool.mean(hidden)

        assert torch.equal(child(by_native), expected)
        """,
        FASTPOOL_BACKEND="reference",
    )


def test_without_the_native_library() -> None:
    """The child of a child, by another thread: only Python knows."""
    run(
        """
        fastpool.backends.native.info = None
        expected = fastpool.mean(hidden)

        def first():
            torch.set_num_threads(4)
            return in_thread(lambda: child(lambda: heard(lambda: fastpool.mean(hidden))))

        result, said = child(first)
        assert torch.equal(result, expected) and len(said) == 1
        """,
        FASTPOOL_BACKEND="reference",
    )
