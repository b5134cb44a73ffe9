"""What a run sends: in order, gathered, and never more than one saved step ahead."""

from __future__ import annotations

import threading

from lightx2v.farm.messages import Ended, Heard, Message, StepSaved
from lightx2v.farm.outbox import Outbox
from lightx2v.jobs.replica import Outcome
from lightx2v.progress import Progress

END = Ended(outcome=Outcome())


def heard(stage: str, step: int, preview: bytes | None = None) -> Heard:
    return Heard(progress=Progress(stage=stage, step=step), preview=preview)


def sent(outbox: Outbox) -> list[Message]:
    return [message for messages in outbox for message in messages]


def test_every_denoising_step_arrives_and_of_other_stages_the_newest_event() -> None:
    outbox = Outbox()
    steps = [heard("denoise", step) for step in range(5)]
    for message in (heard("load", 1), heard("load", 2), *steps, heard("decode", 1, b"jpeg"), heard("decode", 2), END):
        outbox.put(message)
    assert sent(outbox) == [heard("load", 2), *steps, heard("decode", 1, b"jpeg"), heard("decode", 2), END]


def test_messages_that_come_together_travel_together() -> None:
    outbox = Outbox()
    for step in range(5):
        outbox.put(heard("denoise", step))
    batches = iter(outbox)
    assert len(next(batches)) == 5
    outbox.put(END)
    assert list(batches) == [[END]]


def test_a_second_saved_step_waits_until_the_first_was_taken() -> None:
    outbox, first, second = Outbox(), StepSaved(data=b"1"), StepSaved(data=b"2")
    outbox.put(first)
    put = threading.Thread(target=lambda: [outbox.put(message) for message in (second, END)])
    put.start()
    put.join(0.1)
    assert put.is_alive()
    batches = iter(outbox)
    assert next(batches) == [first]
    put.join()
    assert [message for messages in batches for message in messages] == [second, END]
