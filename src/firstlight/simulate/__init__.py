"""The engine's policies without the engine: on a virtual clock with a cost model, or on a log of what happened."""
