"""A score: the size of a weight beside the mean size in its layer."""

from minihyperflows import lab
from minihyperflows.nn import weighted_layers


@lab.register("score", "relative")
def relative(net, x, labels):
    sizes = {
        f"{name}.weight": abs(layer.weight.data) for name, layer in weighted_layers(net).items()
    }
    return {name: size / size.mean() for name, size in sizes.items()}
