"""Compare what the documents' commands print with what is written.

Each document gets a copy of the project, a Compose project and a port of its own, and has to leave
the copy as it was, and no container, network or volume. Relatives of this, for other documents than
lessons that build on each other: byexample, scrut and tesh.
"""

import difflib
import signal

from tools.console import free_port, matches, opened, refuse_taken
from tools.engine import nameless, ours, reserved, second_machine
from tools.reading import DOCUMENTS, SHOWN_PORT, Document, Step, faults

# With 0 and 1 for what ends well on Ctrl-C; else the shell's status, or the signal's.
INTERRUPTED = {0, 1, 130, -signal.SIGINT}
NO_SECOND = "não há o contexto maquina2, ou a variável MAQUINA1"


def ended_well(step: Step, status: int) -> bool:
    """Tell whether a step has ended with a status that the document promises."""
    if step.interrupt is not None:
        return status in INTERRUPTED
    return (status != 0) == step.fails


def difference(step: Step, status: int, printed: str) -> str:
    """Return what is wrong with what a step printed, as a diff, or nothing."""
    expected = step.expected
    if step.hidden or step.interrupt == len(expected):  # what comes after the end is not shown
        expected = [*expected, "..."]
    if ended_well(step, status) and matches(expected, printed):
        return ""
    shown = printed.splitlines()
    diff = difflib.unified_diff(expected, shown, step.where, "impresso", lineterm="")
    what = step.edit.told() if step.edit else step.command
    return "\n".join([f"{step.where}: {what}", f"(código {status})", *diff])


def todo(document: Document, kind: str) -> list[Step]:
    """Return the steps that a test of a kind runs: for a Swarm, ``swarm2`` only with a second."""
    kinds = {kind, "swarm2"} if kind == "swarm" and second_machine() else {kind}
    return [step for step in document.steps if step.kind in kinds]


def check_document(document: Document, kind: str) -> str:
    """Run a document's steps of a kind.

    Return what is wrong with the first that fails, or with what they leave, or nothing.
    """
    steps = todo(document, kind)
    if not steps:
        return ""
    port = SHOWN_PORT if document.port_as_written else free_port()
    with opened(kind, port) as shown:
        others = nameless(kind)
        for step in steps:
            status, printed = shown.do(step)
            wrong = difference(step, status, shown.as_documented(printed))
            if wrong:
                return wrong
        shown.end_commands()
        remains = sorted(ours(kind) | (nameless(kind) - others)) + shown.changed()
    return f"{document.name}: não ficou como antes: {', '.join(remains)}" if remains else ""


def check(documents: list[Document], kind: str) -> str:
    """Run the documents' steps of a kind; return what is wrong with the first that fails.

    Raises CannotRunError where they can't be run here.
    """
    with reserved(kind):
        if any(document.port_as_written and todo(document, kind) for document in documents):
            refuse_taken(SHOWN_PORT)
        for document in documents:
            wrong = check_document(document, kind)
            if wrong:
                return wrong
    return ""


def count(documents: list[Document], kind: str) -> str:
    """Return how many of the documents' commands have been run, in a sentence."""
    run = sum(step.shown for document in documents for step in todo(document, kind))
    second = sum(step.shown and step.kind == "swarm2" for each in documents for step in each.steps)
    if kind == "swarm" and not second_machine():
        return (
            f"{run} comandos mostram o que está escrito; {second} não foram executados: {NO_SECOND}"
        )
    return f"{run} comandos mostram o que está escrito"


def test(kind: str) -> int:
    """Check the documents, and run their commands of a kind; return the exit status."""
    documents = [Document(path) for path in DOCUMENTS]
    wrong = "\n".join(fault for each in documents for fault in faults(each))
    if not wrong and not any(todo(document, kind) for document in documents):
        wrong = f"Nenhum comando é do tipo {kind}"
    if not wrong:
        wrong = check(documents, kind)
    if wrong:
        print(wrong)
        return 1
    print(count(documents, kind))
    return 0
