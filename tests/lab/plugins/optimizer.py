"""An optimiser: the sign of a mean of gradients. ``--set pruning.optimizer=sign``"""

import numpy as np

from minihyperflows import lab, optim


@lab.register("optimizer", "sign")
class Sign(optim.Optimizer):
    slots = ("mean",)

    def __init__(self, params, lr, weight_decay=0.0, beta=0.9):
        super().__init__(params, lr, weight_decay)
        self.beta = beta

    def update_block(self, theta, gradient, slots, step, scratch):
        (mean,) = slots
        mean += (1 - self.beta) * (gradient + self.weight_decay * theta - mean)
        theta -= self.lr * np.sign(mean)
