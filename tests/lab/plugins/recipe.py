"""A recipe: the main job in a few seconds. ``minihyperflows prune quick --plugin recipe.py``"""

from minihyperflows import lab


@lab.register("recipe", "quick")
def quick():
    shorter = lab.RECIPES["lenet300-digits"].scaled(0.1)
    return shorter.with_fields({"target_sparsity": 0.8, "pressure.updates_per_epoch": 5})
