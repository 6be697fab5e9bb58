"""Public checks: what the package's tests use, what exercises and assignments are graded with.

Every check takes what it is to judge as arguments, returns nothing if all is well and raises an
``AssertionError`` otherwise, whose message says what was expected, what was found and what is
probably wrong. Random draws come from ``rng``, a seed or a ``numpy.random.Generator``, so a check
is repeatable. No test framework is needed::

    from minihyperflows import testing

    testing.check_function(MySquare, (3, 4))                     # a Function subclass
    testing.check_grad(lambda x, y: (x @ y).exp(), a, b)         # any function of tensors
    testing.check_scheduler(MyScheduler(target_sparsity=0.98, epochs=40))
"""

from minihyperflows.testing.compare import assert_close
from minihyperflows.testing.curvature import check_hessian_product
from minihyperflows.testing.functions import check_function, check_module
from minihyperflows.testing.gradients import check_complex_step, check_grad, numerical_gradient
from minihyperflows.testing.hypernetworks import check_hypernetwork
from minihyperflows.testing.optimizers import check_optimizer
from minihyperflows.testing.proximal import check_proximal
from minihyperflows.testing.pruners import check_pruner
from minihyperflows.testing.pruning import check_scheduler, check_surrogate
from minihyperflows.testing.scores import check_score

__all__ = [
    "assert_close",
    "check_complex_step",
    "check_function",
    "check_grad",
    "check_hessian_product",
    "check_hypernetwork",
    "check_module",
    "check_optimizer",
    "check_proximal",
    "check_pruner",
    "check_scheduler",
    "check_score",
    "check_surrogate",
    "numerical_gradient",
]
