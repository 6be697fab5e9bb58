"""The same dynamics on a GPU: gate, flux, pressure and both optimisers in one kernel."""
