"""What runs beside a rank's program: operations one after the other, and an exchange in which no kernel takes part.

Chapter: model_parallel/fs_moe.
"""


class Queue:
    """Operations of a rank beside its program, one after the other, in the order of `start`."""

    def __init__(self, comm):
        self.comm, self.last = comm, None

    def start(self, function, *args, name=None):
        """A Request for function(*args), begun when what was started before is done. `name`: its name in the trace."""
        before = self.last

        def in_turn():
            if before is not None:
                before.wait()
            return function(*args)

        self.last = self.comm.spawn(in_turn, name=name or function.__name__)
        return self.last


def exchange(comm, parts, tag):
    """Part j goes to rank j, all at once. Returns what came from each, one's own included."""
    others = [(comm.rank + hop) % comm.size for hop in range(1, comm.size)]
    incoming = {j: comm.irecv(j, tag=tag) for j in others}
    outgoing = [comm.isend(parts[j], j, tag=tag) for j in others]
    received = [parts[j] if j == comm.rank else incoming[j].wait() for j in range(comm.size)]
    for sent in outgoing:
        sent.wait()
    return received
