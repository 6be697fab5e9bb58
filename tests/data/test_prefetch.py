"""Items made in a second thread: the same ones, in order, and no thread left behind."""

import contextvars
import itertools
import threading
from contextlib import closing

import numpy as np
import pytest

from minihyperflows import lab
from minihyperflows.data.prefetch import prefetch
from minihyperflows.lab import Trainer

SECONDS = 60.0  # that a test waits before it gives up


def threads_of_prefetch():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.fixture(autouse=True)
def no_thread_stays():
    yield
    assert not threads_of_prefetch()  # the engine may well keep threads of its own


@pytest.mark.parametrize("depth", [1, 2, 5, 100])
@pytest.mark.parametrize("n", [0, 1, 2, 50])
def test_all_items_in_order(n, depth):
    assert list(prefetch(range(n), depth)) == list(range(n))


def test_none_and_exceptions_are_items_like_others():
    items = [None, ValueError("an item, not raised"), StopIteration()]
    assert list(prefetch(items)) == items


def test_items_are_made_elsewhere_and_ahead_but_not_too_far():
    made, threads = [], set()
    far_enough = threading.Event()

    def items():
        for i in range(20):
            threads.add(threading.current_thread())
            made.append(i)
            if i == 3:
                far_enough.set()
            yield i

    with closing(prefetch(items(), depth=3)) as prefetched:
        assert not made  # nothing happens before the first item is asked for
        assert next(prefetched) == 0
        assert far_enough.wait(SECONDS)  # items 1, 2 and 3 without anybody asking
        assert len(made) == 4
        assert next(prefetched) == 1
    assert len(made) <= 5
    assert threading.current_thread() not in threads


def test_an_error_comes_after_the_items_before_it():
    def items():
        yield 1
        yield 2
        raise KeyError("the third")

    prefetched = prefetch(items())
    assert [next(prefetched), next(prefetched)] == [1, 2]
    with pytest.raises(KeyError, match="the third") as error:
        next(prefetched)
    assert error.traceback[-1].name == "items"  # where it happened, not where it arrived
    assert list(prefetched) == []


def test_what_is_not_iterable_is_an_error_of_the_consumer():
    with pytest.raises(TypeError, match="not iterable"):
        list(prefetch(3))


def fail_at_five():
    with closing(prefetch(itertools.count())) as prefetched:
        for i in prefetched:
            1 / (i - 5)


def test_a_consumer_that_stops_early_stops_the_thread():
    made = []
    with closing(prefetch(map(made.append, itertools.count()))) as prefetched:
        next(prefetched)
    count = len(made)
    assert count <= 4
    with pytest.raises(ZeroDivisionError):
        fail_at_five()
    for i in prefetch(itertools.count()):  # dropped without being closed
        if i == 3:
            break
    assert len(made) == count


def test_context_variables_reach_the_thread():
    variable = contextvars.ContextVar("variable", default="unset")
    variable.set("set")
    assert list(prefetch(variable.get() for _ in range(2))) == ["set", "set"]
    with np.errstate(over="raise"):
        assert list(prefetch(np.geterr()["over"] for _ in range(1))) == ["raise"]


def test_a_depth_below_one_is_refused_at_once():
    with pytest.raises(ValueError, match="depth of 1 or more, not 0"):
        prefetch([], depth=0)


# -- in training ---------------------------------------------------------------------------------


def augmented_trainer():
    data = lab.make_shapes32(train=50, test=10)
    options = {"dataset": "shapes32", "model": "lenet300", "batch_size": 8, "augment": True}
    recipe = lab.Recipe.from_json(lab.RECIPES["lenet300-digits"].scaled(1e-9).to_json() | options)
    rng = np.random.default_rng(0)
    return Trainer(lab.build_network(recipe, data, rng), data, recipe, rng)


@pytest.mark.slow
def test_training_is_the_same_with_and_without_prefetching():
    """Losses, weights and the state of the generator, to the last bit."""
    states = []
    for ahead in (True, False):
        trainer = augmented_trainer()
        assert trainer.loop.ahead
        trainer.loop.ahead = ahead
        records = [trainer.run_epoch() for _ in range(3)]
        arrays, values = trainer.state_dict()
        losses = [(r.train_loss, r.test_accuracy, r.density) for r in records]
        states.append((losses, values, {k: v.tobytes() for k, v in arrays.items()}))
    assert states[0] == states[1]


def test_batches_are_made_in_another_thread_if_they_are_augmented(monkeypatch):
    threads = []

    def batches(self):
        for batch in real(self):
            threads.append(threading.current_thread())
            yield batch

    real = Trainer.batches
    monkeypatch.setattr(Trainer, "batches", batches)
    augmented_trainer().run_epoch()
    assert len(threads) == 7
    assert threading.current_thread() not in threads


def test_an_epoch_that_fails_leaves_no_thread(monkeypatch):
    def fail(self):
        raise RuntimeError("in the middle of an epoch")

    monkeypatch.setattr(Trainer, "step", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        augmented_trainer().run_epoch()
    assert not threads_of_prefetch()
