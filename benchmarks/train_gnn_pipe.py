"""Train the small network of GNNPipe's chapter five ways and keep accuracies and losses, in
toolkit/claims/model_parallel/gnn_pipe.npz: about ten minutes, one core. Same seeds, same file.

    python benchmarks/train_gnn_pipe.py
"""

from pathlib import Path

import numpy as np

from toolkit.model_parallel import gnn_pipe
from toolkit.model_parallel._gnn_pipe_graph import community_graph
from toolkit.model_parallel._gnn_pipe_layers import first_weights, layers_of
from toolkit.runtime import Cluster, hardware, topology

TARGET = Path(__file__).resolve().parents[1] / "toolkit" / "claims" / "model_parallel" / "gnn_pipe.npz"
DEPTH, HIDDEN, CHUNKS, EPOCHS, RATE, SEEDS = 8, 16, 16, 600, 0.002, 3
SCHEMES = {  # chunks, and how GNNPipe is changed
    "exact": (1, {}),
    "GNNPipe": (CHUNKS, {}),
    "history of the last epoch": (CHUNKS, {"period": 1}),
    "chunks always in one order": (CHUNKS, {"shuffle": False}),
    "backward in forward order": (CHUNKS, {"reverse": False}),
}


def learn(chunks, options, seed):
    """(accuracy on test vertices by exact inference, loss of each epoch). Stages change nothing, so one is enough."""
    graph = community_graph(seed=seed)
    layers = layers_of("gcnii", DEPTH, graph.features.shape[1], HIDDEN, graph.labels.max() + 1)
    chunk, _ = gnn_pipe.cut(graph.adjacency, chunks)
    one = Cluster(topology.full_mesh(1, hardware.NVLINK4), hardware.IDEAL)
    share = gnn_pipe.placed(gnn_pipe.shares(graph, chunk), 1)
    start = first_weights(layers, seed)
    run = one.run(gnn_pipe.train, share, start, layers=layers, epochs=EPOCHS, rate=RATE, seed=seed, **options)
    weights, losses = gnn_pipe.trained(run)
    right = gnn_pipe.predict(graph, layers, weights).argmax(axis=1) == graph.labels
    return right[~graph.train].mean(), losses


def main():
    kept = {}
    for name, (chunks, options) in SCHEMES.items():
        results = [learn(chunks, options, seed) for seed in range(SEEDS)]
        kept[name] = np.array([[accuracy, losses[-1]] for accuracy, losses in results])
        kept[f"{name} curve"] = np.mean([losses for _, losses in results], axis=0).astype(np.float32)
        print(f"{name}: {100 * kept[name][:, 0].mean():.1f} %", kept[name].round(3).tolist(), flush=True)
    np.savez_compressed(TARGET, **kept)


if __name__ == "__main__":
    main()
