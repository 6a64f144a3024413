"""Every mistake the runtime can name. Each message says what happened, when, where, who else, what to do."""


class RuntimeFault(RuntimeError):
    """Base of all errors raised by the virtual runtime."""


class ShapeError(RuntimeFault, ValueError):
    """An array has a shape the operation cannot take."""


class DtypeError(RuntimeFault, ValueError):
    """An array has a dtype the operation cannot take, or a message holds something that is not an array."""


class UnknownRank(RuntimeFault, ValueError):
    """A message or a root names a rank that the communicator does not have."""


class DeadlockError(RuntimeFault):
    """Every unfinished rank waits, and nothing that could wake one is under way."""


class CollectiveMismatch(RuntimeFault):
    """The ranks of one communicator entered different collectives, roots, operators or algorithms."""


class UnreceivedMessage(RuntimeFault):
    """The run ended with a message sent that nobody received, or a receive posted that nobody served."""


class OutOfDeviceMemory(RuntimeFault, MemoryError):
    """The live arrays of a rank exceed its device's memory."""


class BufferInUse(RuntimeFault):
    """A rank wrote to an array while a message was still being sent from it."""


class RequestTimeout(RuntimeFault, TimeoutError):
    """`wait(timeout=…)` ran out of virtual time."""


class RequestCancelled(RuntimeFault):
    """`wait()` on a request that `cancel()` took back."""


class InvalidFault(RuntimeFault, ValueError):
    """A fault in a cluster's description names what the cluster lacks, or numbers that make no sense."""


class PeerCrashed(RuntimeFault):
    """A rank waits for one that has crashed."""


class LinkDown(RuntimeFault):
    """A message is on a link that is dead and does not come back."""
