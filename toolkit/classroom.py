"""Checks for exercises: every one ends, and every failure names the question and says what to do.

    with check("1. Count the bytes", seconds=5) as answer:
        sent = answer(bytes_sent, ranks=8, slice_bytes=4096)
        assert sent == 7 * 4096, f"a slice is passed on 7 times, you returned {sent}"

A check cell raises `NotYet` until the answer is right, so nbgrader, and a reader, can believe it.
Chapter: how a chapter uses this is in CONTRIBUTING.md.
"""

import contextlib
import io
import signal
import threading
import traceback
from pathlib import Path

import numpy as np

_HERE = Path(__file__).parent


class NotYet(AssertionError):
    """The answer to a question is not right yet; the message names the question and the next step."""

    def _render_traceback_(self):  # IPython asks for this: the sentence, without our own stack above it
        return [f"Not yet. {self}"]


class _TimeIsUp(BaseException):
    """Not an Exception, so that a student's `except Exception` does not keep an endless loop alive."""


class check:
    """Run the body under a wall-clock limit and turn whatever goes wrong into one helpful `NotYet`.

    question  str    what the message starts with: the exercise's number and title
    seconds   float  wall-clock limit of the whole body (POSIX main thread; elsewhere the limit is the grader's own)
    yields    a callable: `answer(function, *args, **kwargs)` calls and refuses None
    raises    NotYet
    """

    def __init__(self, question, seconds=10.0):
        self.question, self.seconds = question, seconds
        self.printed = _Head()

    def __call__(self, function, *args, **kwargs):
        """Call the student's function; a returned None is an error that says so."""
        value = function(*args, **kwargs)
        if value is None:
            raise NotYet(f"`{getattr(function, '__name__', 'your function')}` returned None.")
        return value

    def __enter__(self):
        self.stdout = contextlib.redirect_stdout(self.printed)
        self.stdout.__enter__()
        self.timed = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
        if self.timed:
            self.handler = signal.signal(signal.SIGALRM, self._stop)
            signal.setitimer(
                signal.ITIMER_REAL, self.seconds, 1.0
            )  # again each second: a bare except may eat one
        return self

    def _stop(self, signum, frame):
        raise _TimeIsUp

    def __exit__(self, kind, error, trace):
        if self.timed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self.handler)
        self.stdout.__exit__(None, None, None)
        if error is None:
            print(f"{self.question}: correct.")
        elif isinstance(error, (Exception, _TimeIsUp)):
            crashed = isinstance(error, Exception) and not isinstance(error, AssertionError)
            raise NotYet(f"{self.question}: {self._sentence(error)}") from (error if crashed else None)

    def _sentence(self, error):
        chain = list(_causes(error))
        if any(isinstance(e, _TimeIsUp) for e in chain):
            return (
                f"still running after {self.seconds:g} s of wall-clock time. "
                "Look for a loop whose condition never becomes false."
            )
        if any(isinstance(e, NotImplementedError) for e in chain):
            return "not answered yet. Replace `raise NotImplementedError()` by your code and run both cells again."
        if isinstance(error, NotYet):
            hint = " It printed its result: return it instead." if self.printed.text.strip() else ""
            return str(error) + (hint or " End your function with a `return`.") * (
                "returned None" in str(error)
            )
        if isinstance(error, AssertionError):
            return str(error) or f"this did not hold: {_line(error)}"
        if isinstance(error, NameError):
            return f"{error}. Run the cell that defines it, above, and see that it ends without an error."
        return f"{type(error).__name__}: {error} (at {_line(error)})"


def on_targets(
    run, *, equals, seconds=None, bytes=None, at_scale=None, axis=1, layout="contiguous", tolerance=1e-10
):
    """Grade a schedule: the right result, in time, within its traffic.

    run        a finished numeric run of the student's program
    equals     the reference: one array, compared with `run.gather(axis, layout)`; or a list, one array a rank
    seconds    virtual time that the run has to stay within; None: no target
    bytes      payload that no rank may exceed in what it sends; None: no target
    at_scale   a second, usually shape-only, run that time and bytes are taken from
    tolerance  largest absolute difference from the reference
    raises     NotYet: a table of the targets, with what was measured and which are missed
    """
    for rank, output in enumerate(run.outputs):
        if output is None:
            raise NotYet(f"rank {rank} returned None.")
    timed = at_scale or run
    error = _difference(run, equals, axis, layout)
    sent = float(np.max(np.sum(timed.traffic.by_pair, axis=1)))
    rows = [
        ("result", error <= tolerance, f"differs from the reference by {error:.1e}, may be {tolerance:.0e}")
    ]
    if seconds is not None:
        met = timed.makespan <= seconds
        rows.append(("time", met, f"{timed.makespan * 1e3:.4g} ms, target {seconds * 1e3:.4g} ms"))
    if bytes is not None:
        rows.append(
            (
                "bytes",
                sent <= bytes,
                f"{sent / 1e6:.4g} MB from the busiest rank, target {bytes / 1e6:.4g} MB",
            )
        )
    table = "\n".join(f"  {'met   ' if met else 'MISSED'}  {name:<7} {text}" for name, met, text in rows)
    missed = [name for name, met, _ in rows if not met]
    if missed:
        raise NotYet(f"missed: {', '.join(missed)}.\n{table}")
    return table


def _difference(run, equals, axis, layout):
    """Largest absolute difference; inf where a shape is wrong or a value is not a number."""
    if isinstance(equals, list):
        pairs = list(zip(run.outputs, equals, strict=True))
    else:
        pairs = [(run.gather(axis=axis, layout=layout), equals)]
    for got, want in pairs:
        if np.shape(got) != np.shape(want):
            raise NotYet(
                f"missed: result. Its shape is {np.shape(got)}, the reference's is {np.shape(want)}."
            )
    worst = max(float(np.max(np.abs(np.subtract(got, want)), initial=0.0)) for got, want in pairs)
    return worst if worst == worst else float("inf")


def _causes(error):
    """The exception and what it came from, innermost last: the runtime may wrap what a rank raises."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _line(error):
    """Where the innermost cause left the student's code, as `line 3: text`."""
    for cause in reversed(list(_causes(error))):
        frames = traceback.extract_tb(cause.__traceback__)
        theirs = [frame for frame in frames if not Path(frame.filename).is_relative_to(_HERE)]
        if theirs:
            return f"line {theirs[-1].lineno}: {theirs[-1].line}"
    return "a line we cannot see"


class _Head(io.TextIOBase):
    """Keeps the first 2 000 characters written, so that an endless loop of prints stays small."""

    text = ""

    def write(self, more):
        self.text = (self.text + more)[:2000] if len(self.text) < 2000 else self.text
        return len(more)
