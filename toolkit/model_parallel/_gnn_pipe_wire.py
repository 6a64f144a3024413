"""Activations after a ReLU, with their zeros as a bit each: lossless. Chapter: model_parallel/gnn_pipe."""

import numpy as np

from toolkit.runtime import Cost, kernel


@kernel(cost=lambda x: Cost(0, 2 * x.nbytes))
def squeeze(x):
    """x (rows, width) as (bits (rows, ⌈width / 8⌉) uint8, the values that are not zero)."""
    return np.packbits(x != 0, axis=1), x[x != 0]


@kernel(cost=lambda bits, values, width: Cost(0, 2 * values.nbytes))
def unsqueeze(bits, values, width):
    x = np.zeros((len(bits), width), values.dtype)
    x[np.unpackbits(bits, axis=1, count=width).astype(bool)] = values
    return x


def wire(stage):
    """How a stage packs and unpacks what crosses its borders: options of `_pipeline.run`."""
    width = stage.layers[stage.places[0]].fan_in if stage.last else stage.layers[stage.places[-1]].fan_out

    def pack(message):
        return tuple(map(squeeze, message)) if isinstance(message, tuple) else squeeze(message)

    def unpack(message):
        if isinstance(message[0], tuple):
            return tuple(unsqueeze(*part, width) for part in message)
        return unsqueeze(*message, width)

    return {"pack": pack, "unpack": unpack}
