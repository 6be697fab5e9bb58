"""A model: narrow layers, ``depth`` of them. ``--set model=tallnet --set model_options.depth=4``"""

from minihyperflows import lab, nn


@lab.register("model", "tallnet")
def tallnet(*, num_classes, in_features, rng, dtype, depth: int = 3, width: int = 24):
    layers = [nn.Flatten()]
    for _ in range(depth):
        layers += [nn.Linear(in_features, width, rng=rng, dtype=dtype), nn.ReLU()]
        in_features = width
    return nn.Sequential(*layers, nn.Linear(width, num_classes, rng=rng, dtype=dtype))
