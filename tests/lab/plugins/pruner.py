"""A pruner: half of what is to go before the first step, the rest halfway."""

from minihyperflows import lab
from minihyperflows.related.pruners import Pruner


@lab.register("pruner", "two-cuts")
class TwoCuts(Pruner):
    def prepare(self):
        self.keep_largest(self.magnitudes(), (self.total + self.kept) // 2)

    def after_step(self, step):
        if step == self.steps // 2:
            self.keep_largest(self.magnitudes(), self.kept)
