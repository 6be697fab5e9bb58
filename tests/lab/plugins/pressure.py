"""A pressure: the mean of t within each layer, so that small layers feel more of it.

``--set pressure.kind=layers --set pressure.kind_options.share=0.5``
"""

from minihyperflows import flows, lab


@lab.register("pressure", "layers")
def layers(net, share: float = 1.0):
    parts = flows.presences(net).values()
    return share * sum(t.mean() for t in parts) / len(parts)
