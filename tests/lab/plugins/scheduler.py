"""A scheduler: a proportional and integral controller. ``--set pressure.scheduler=pi``"""

from minihyperflows import lab


@lab.register("scheduler", "pi")
class ProportionalIntegral:
    def __init__(self, target_sparsity, epochs, p=20.0, i=5.0):
        self.target, self.epochs, self.p, self.i = 1 - target_sparsity, epochs, p, i
        self.gamma = self.total = 0.0

    def expected(self, epoch):
        return self.target ** min(epoch / self.epochs, 1.0)

    def update(self, epoch, density):
        error = density / self.expected(epoch) - 1
        self.total += error
        self.gamma = max(0.0, self.p * error + self.i * self.total)
        return self.gamma

    def state_dict(self):
        return {"gamma": self.gamma, "total": self.total}

    def load_state_dict(self, state):
        self.gamma, self.total = state["gamma"], state["total"]
